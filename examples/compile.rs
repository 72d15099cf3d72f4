//! Compiles a folder without the rest of the worker, for parity tests and
//! benchmarks: `compile SOURCE OUTPUT [PRECISION [PROVIDER [FEATURE_LAYER]]]`,
//! with the runtime's library in `ORT_DYLIB_PATH`.

use std::path::Path;

use anyhow::Context;
use clap::ValueEnum;
use imagegpt::compile::{
    CompileOptions, Precision, Progress, Provider, Residence, Runtime, Source, Step, compile,
};

struct Steps(Option<(Step, std::time::Instant)>);

impl Steps {
    fn end(&mut self) {
        if let Some((step, start)) = self.0.take() {
            eprintln!("{step:?}: {:.2?}", start.elapsed());
        }
    }
}

impl Progress for Steps {
    fn begin(&mut self, step: Step, _total: u64) {
        self.end();
        self.0 = Some((step, std::time::Instant::now()));
    }
    fn advance(&mut self, _units: u64) {}
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |idx: usize| arguments.get(idx).map(String::as_str);
    let source = Source::parse(argument(0).context("no SOURCE")?, None);
    let output = Path::new(argument(1).context("no OUTPUT")?);
    let options = CompileOptions {
        precision: Precision::from_str(argument(2).unwrap_or("fp32"), true)
            .map_err(anyhow::Error::msg)?,
        provider: Provider::from_str(argument(3).unwrap_or("cpu"), true)
            .map_err(anyhow::Error::msg)?,
        feature_layer: argument(4).map(str::parse).transpose()?,
        ..CompileOptions::default()
    };
    let library = std::env::var_os("ORT_DYLIB_PATH").context("no ORT_DYLIB_PATH")?;
    let trial = std::env::var("TRIAL_PROVIDER").unwrap_or_else(|_| "cpu".to_owned());
    let runtime = Runtime {
        environment: ort::init_from(library)?.with_telemetry(false).build()?,
        provider: Provider::from_str(&trial, true).map_err(anyhow::Error::msg)?,
        operators: None,
        n_threads: 2,
        residence: Residence::Mapped,
    };
    let mut steps = Steps(None);
    let manifest = compile(&source, output, &options, &runtime, &mut steps)?;
    steps.end();
    for (name, graph) in &manifest.graphs {
        let worst = graph.errors.iter().copied().fold(0.0, f64::max);
        println!("{name}: error {worst:.2e}, cosine {:.6}", graph.cosine);
        for (provider, operators) in &graph.operators {
            println!("  {provider}: {operators:?}");
        }
    }
    Ok(())
}
