//! Tables of `imagegpt bench engine`.

use std::io::Write;

use serde_json::Value;

use super::super::report::{NONE, Table, short};
use super::{Findings, Loaded};

/// Writes the facts that all results depend on: machine, model and engine.
pub(super) fn header(
    loaded: &Loaded,
    machine: &Value,
    out: &mut impl Write,
) -> std::io::Result<()> {
    let (model, facts) = (&loaded.model, loaded.engine.facts());
    writeln!(
        out,
        "machine: {}, {} threads, load {}",
        machine["cpu"].as_str().unwrap_or("unknown"),
        machine["threads"],
        machine["load_average"].as_str().unwrap_or("unknown")
    )?;
    let precision = model
        .compiled
        .map_or("as exported", |compiled| compiled.precision.name());
    writeln!(
        out,
        "model: {} ({}), {precision} on {}, ONNX Runtime {}, loaded in {:.1} s",
        model.name,
        model.digest,
        facts.provider,
        facts.runtime_version,
        loaded.elapsed.as_secs_f64()
    )?;
    if !model.notice.is_empty() {
        writeln!(out, "notice: {}", model.notice)?;
    }
    Ok(())
}

pub(super) fn table(findings: &Findings, out: &mut impl Write) -> std::io::Result<()> {
    let roofline = &findings.roofline;
    writeln!(
        out,
        "roofline: {} TFLOP/s in products of {side} x {side} matrices, {}, {} runs",
        short(roofline.tflop_per_second),
        roofline.precision,
        roofline.runs,
        side = roofline.side,
    )?;
    if !findings.graphs.is_empty() {
        writeln!(out)?;
        graphs(findings).write(out)?;
    }
    if !findings.generate.is_empty() {
        writeln!(out)?;
        generate(findings).write(out)?;
    }
    if !findings.nearness.is_empty() {
        writeln!(out)?;
        nearness(findings).write(out)?;
    }
    Ok(())
}

fn graphs(findings: &Findings) -> Table {
    let header = [
        "graph",
        "batch",
        "runs",
        "median ms",
        "images/s",
        "GFLOP/image",
        "TFLOP/s",
        "of roofline",
    ];
    let mut table = Table::new(&header);
    let or_none = |value: Option<String>| value.unwrap_or_else(|| NONE.to_owned());
    for row in &findings.graphs {
        let gflop = row
            .flop_per_image
            .map(|flop| short(super::as_f64(flop) / 1e9));
        let share = row
            .roofline_share
            .map(|share| format!("{:.1} %", 100.0 * share));
        table.row(vec![
            row.graph.to_owned(),
            row.batch_size.to_string(),
            row.runs.to_string(),
            short(row.median_ms),
            short(row.images_per_second),
            or_none(gflop),
            or_none(row.tflop_per_second.map(short)),
            or_none(share),
        ]);
    }
    table
}

fn generate(findings: &Findings) -> Table {
    let header = [
        "generate",
        "past",
        "shared",
        "runs",
        "median ms",
        "tokens/s",
    ];
    let mut table = Table::new(&header);
    for row in &findings.generate {
        table.row(vec![
            format!("{} at the same time", row.slots),
            row.past.to_string(),
            row.shared.to_string(),
            row.runs.to_string(),
            short(row.median_ms),
            short(row.tokens_per_second),
        ]);
    }
    table
}

fn nearness(findings: &Findings) -> Table {
    let header = [
        "against the reference",
        "images",
        "relative error",
        "cosine",
    ];
    let mut table = Table::new(&header);
    for row in &findings.nearness {
        table.row(vec![
            row.graph.to_owned(),
            row.n_images.to_string(),
            format!("{:.1e}", row.relative_error),
            format!("{:.6}", row.cosine),
        ]);
    }
    table
}
