//! The surface that users, clients and dashboards rely on: the contract's
//! messages, flags and variables, metrics with their labels, and exit codes.
//! Each is compared with a text in this directory (a snapshot), so that none
//! changes by accident.
//!
//! Two pages for users, docs/flags.md and the table in docs/metrics.md, are made
//! from the code and compared in the same way.
//!
//! An intended change is written by `IMAGEGPT_SNAPSHOTS=write cargo test --test
//! outside`, and needs a line in CHANGELOG.md. Reasons of errors are compared
//! beside their table, in `src/serve/rpc/status.rs`.

#![warn(clippy::disallowed_methods)]

mod pages;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use clap::CommandFactory as _;
use imagegpt::commands::cli::{Cli, exit};
use imagegpt::commands::environment::UnknownVariable;
use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorSet};

/// Compares `actual` with the snapshot `name`, or writes the snapshot.
fn compare(name: &str, actual: &str) {
    compare_file(&format!("tests/outside/{name}.txt"), actual);
}

/// Compares with a file of the repository, or writes it.
fn compare_file(file: &str, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    if std::env::var_os("IMAGEGPT_SNAPSHOTS").is_some_and(|value| value == "write") {
        std::fs::write(&path, actual).expect("a snapshot");
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    let (lines, known) = (actual.lines().collect(), expected.lines().collect());
    let difference = |one: &Vec<&str>, other: &Vec<&str>| {
        let other: BTreeSet<&str> = other.iter().copied().collect();
        let only = one.iter().filter(|line| !other.contains(*line));
        only.copied().collect::<Vec<_>>().join("\n")
    };
    assert!(
        actual == expected,
        "the code no longer agrees with {file}; write that file anew if the change is meant (see \
         tests/outside/main.rs).\nnew:\n{}\ngone:\n{}",
        difference(&lines, &known),
        difference(&known, &lines)
    );
}

#[test]
fn the_contract() {
    let set = FileDescriptorSet::decode(imagegpt::proto::pb::DESCRIPTORS).expect("descriptors");
    let mut text = String::new();
    for file in &set.file {
        let package = file.package();
        for service in &file.service {
            for method in &service.method {
                let stream = |streams: bool| if streams { "stream " } else { "" };
                let _ = writeln!(
                    text,
                    "rpc {package}.{}/{} ({}{}) ({}{})",
                    service.name(),
                    method.name(),
                    stream(method.client_streaming()),
                    method.input_type(),
                    stream(method.server_streaming()),
                    method.output_type()
                );
            }
        }
        for message in &file.message_type {
            describe_message(&format!("{package}.{}", message.name()), message, &mut text);
        }
        for kind in &file.enum_type {
            describe_enum(&format!("{package}.{}", kind.name()), kind, &mut text);
        }
    }
    compare("contract", &text);
}

fn describe_message(name: &str, message: &DescriptorProto, text: &mut String) {
    for field in &message.field {
        let label = match field.label() {
            Label::Repeated => "repeated ",
            Label::Required => "required ",
            Label::Optional if field.proto3_optional() => "optional ",
            Label::Optional => "",
        };
        let kind = match field.r#type() {
            Type::Message | Type::Enum | Type::Group => field.type_name().to_owned(),
            scalar => scalar
                .as_str_name()
                .trim_start_matches("TYPE_")
                .to_lowercase(),
        };
        let oneof = field
            .oneof_index
            .filter(|_| !field.proto3_optional())
            .and_then(|index| message.oneof_decl.get(usize::try_from(index).ok()?))
            .map(|oneof| format!(" of {}", oneof.name()));
        let _ = writeln!(
            text,
            "field {name}.{} = {} {label}{kind}{}",
            field.name(),
            field.number(),
            oneof.unwrap_or_default()
        );
    }
    for nested in &message.nested_type {
        describe_message(&format!("{name}.{}", nested.name()), nested, text);
    }
    for kind in &message.enum_type {
        describe_enum(&format!("{name}.{}", kind.name()), kind, text);
    }
}

fn describe_enum(name: &str, kind: &EnumDescriptorProto, text: &mut String) {
    for value in &kind.value {
        let _ = writeln!(text, "value {name}.{} = {}", value.name(), value.number());
    }
}

#[test]
fn flags_and_variables() {
    let mut text = String::new();
    let mut cli = Cli::command();
    cli.build();
    describe_command(&cli, "", &mut text);
    compare("flags", &text);
}

/// Directories whose files may name variables.
const NAMING: [&str; 12] = [
    ".ci",
    "benches",
    "deploy",
    "docs",
    "examples",
    "fuzz",
    "models",
    "python",
    "scripts",
    "src",
    "tests",
    "web/tests",
];

/// Adds the variables that the files below `path` name.
fn add_variables(path: &Path, names: &mut BTreeSet<String>) {
    let is_made =
        |name: &std::ffi::OsStr| ["target", "node_modules"].iter().any(|made| name == *made);
    if path.is_dir() {
        for entry in std::fs::read_dir(path).expect("a folder") {
            let entry = entry.expect("an entry");
            if !is_made(&entry.file_name()) {
                add_variables(&entry.path(), names);
            }
        }
        return;
    }
    // Pictures and weights name none.
    let Ok(text) = std::fs::read_to_string(path) else {
        return;
    };
    for (at, prefix) in text.match_indices("IMAGEGPT_") {
        let rest = text[at + prefix.len()..]
            .chars()
            .take_while(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || *c == '_');
        names.insert(format!("{prefix}{}", rest.collect::<String>()));
    }
}

/// A worker warns of variables that nothing reads, and must not of those that
/// another program of this repository does.
#[test]
fn all_variables_of_the_repository_are_known() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut names = BTreeSet::new();
    for place in NAMING {
        add_variables(&root.join(place), &mut names);
    }
    add_variables(&root.join("Makefile"), &mut names);
    assert!(names.len() > 100, "{names:?}");
    let unknown = UnknownVariable::among(names)
        .into_iter()
        .map(|one| one.name);
    // Mistakes and services of tests, and beginnings of names in prose.
    let planted = [
        "IMAGEGPT_",
        "IMAGEGPT_LISTNE",
        "IMAGEGPT_MAX_BATCHSIZE",
        "IMAGEGPT_QUUX",
    ];
    let unknown: Vec<String> = unknown.collect();
    assert_eq!(unknown, planted);
}

#[test]
fn page_of_flags() {
    let mut cli = Cli::command();
    cli.build();
    compare_file("docs/flags.md", &pages::flags_page(&cli));
}

#[test]
fn table_of_metrics() {
    const BEGIN: &str =
        "<!-- generated by: IMAGEGPT_SNAPSHOTS=write cargo test --test outside -->\n";
    const END: &str = "<!-- end of the generated part -->\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let page = std::fs::read_to_string(path).expect("docs/metrics.md");
    let (before, rest) = page.split_once(BEGIN).expect("the beginning of the table");
    let (_, after) = rest.split_once(END).expect("the end of the table");
    let table = pages::metrics_table();
    compare_file(
        "docs/metrics.md",
        &format!("{before}{BEGIN}{table}{END}{after}"),
    );
}

/// Figures of README are those of docs/benchmarks.md, which has their machines and
/// dates.
#[test]
fn figures_of_readme() {
    let read = |file: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        std::fs::read_to_string(path).expect("a document")
    };
    let (readme, benchmarks) = (read("README.md"), read("docs/benchmarks.md"));
    let (_, table) = readme.split_once("## Figures").expect("the table");
    let rows = table.lines().skip_while(|line| !line.starts_with("|---"));
    let mut numbers = 0;
    for row in rows.skip(1).take_while(|line| line.starts_with('|')) {
        let figure = row.split('|').nth(2).expect("a figure");
        let words = figure
            .split_whitespace()
            .map(|word| word.trim_matches([',', ';', '.']));
        for number in words.filter(|word| word.starts_with(|c: char| c.is_ascii_digit())) {
            assert!(
                benchmarks.contains(number),
                "{number} is not in docs/benchmarks.md: {row}"
            );
            numbers += 1;
        }
    }
    assert!(numbers >= 10, "only {numbers} figures");
}

fn describe_command(command: &clap::Command, above: &str, text: &mut String) {
    let path = format!("{above}{}", command.get_name());
    for arg in command.get_arguments() {
        let mut line = match (arg.get_long(), arg.get_short()) {
            (Some(long), None) => format!("--{long}"),
            (Some(long), Some(short)) => format!("--{long} -{short}"),
            (None, Some(short)) => format!("-{short}"),
            (None, None) => arg.get_id().to_string(),
        };
        for name in arg.get_value_names().unwrap_or_default() {
            let _ = write!(line, " {name}");
        }
        if let Some(variable) = arg.get_env() {
            let _ = write!(line, " ${}", variable.to_string_lossy());
        }
        for value in arg.get_default_values() {
            let _ = write!(line, " ={}", value.to_string_lossy());
        }
        let values: Vec<String> = arg
            .get_possible_values()
            .iter()
            .map(|value| value.get_name().to_owned())
            .collect();
        if !values.is_empty() {
            let _ = write!(line, " [{}]", values.join(" "));
        }
        if arg.is_required_set() {
            line.push_str(" required");
        }
        let _ = writeln!(text, "{path} {line} {:?}", arg.get_action());
    }
    for below in command.get_subcommands() {
        describe_command(below, &format!("{path} "), text);
    }
}

#[test]
fn exit_codes() {
    let mut text = String::new();
    for (name, code) in exit::ALL {
        let _ = writeln!(text, "{code} {name}");
    }
    compare("exit_codes", &text);
}

/// Returns every series of a page, with its type and the values of its labels,
/// but without numbers of devices, versions and names of models.
fn series(page: &str) -> String {
    let mut kinds: BTreeMap<&str, &str> = BTreeMap::new();
    let mut lines: BTreeSet<String> = BTreeSet::new();
    for line in page.lines() {
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a type");
            kinds.insert(name, kind);
        } else if let Some(help) = line.strip_prefix("# HELP ") {
            lines.insert(format!("help {help}"));
        } else if let Some((series, _)) = line.rsplit_once(' ') {
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let labels = labels.trim_end_matches('}').split(',');
            let labels: Vec<String> = labels
                .filter(|label| !label.is_empty() && !label.starts_with("le="))
                .map(|label| {
                    let (key, value) = label.split_once('=').expect("a label");
                    match key {
                        "version" | "name" | "digest" => key.to_owned(),
                        _ => format!("{key}={value}"),
                    }
                })
                .collect();
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix))
                .filter(|base| kinds.get(base) == Some(&"histogram"))
                .unwrap_or(name);
            let kind = kinds.get(base).copied().unwrap_or("untyped");
            lines.insert(format!("{kind} {base} {}", labels.join(" ")));
        }
    }
    lines.iter().fold(String::new(), |mut text, line| {
        text.push_str(line.trim_end());
        text.push('\n');
        text
    })
}

/// Returns the bounds of each histogram's buckets.
fn buckets(page: &str) -> String {
    let mut bounds: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in page.lines() {
        if let Some((name, rest)) = line.split_once("_bucket{")
            && let Some((_, bound)) = rest.split_once("le=\"")
            && let Some((bound, _)) = bound.split_once('"')
        {
            let known = bounds.entry(name).or_default();
            if !known.contains(&bound) {
                known.push(bound);
            }
        }
    }
    bounds
        .iter()
        .fold(String::new(), |mut text, (name, bounds)| {
            let _ = writeln!(text, "buckets {name} {}", bounds.join(" "));
            text
        })
}

#[test]
fn metrics() {
    let metrics = every_metric();
    let page = metrics.render();
    compare("metrics", &format!("{}{}", series(&page), buckets(&page)));
}

/// Makes metrics in which everything has happened once.
fn every_metric() -> imagegpt::serve::metrics::Metrics {
    use imagegpt::gpu::{GpuUsage, MemoryUse};
    use imagegpt::model::graph::Graph;
    use imagegpt::proto::{GrpcCode, Priority, RpcMethod};
    use imagegpt::serve::metrics::{BatchClose, Metrics};

    let metrics = Metrics::new().expect("metrics");
    let moment = Duration::from_millis(1);
    for method in RpcMethod::ALL {
        metrics.request(method, GrpcCode::Ok, "", moment);
    }
    metrics.request(RpcMethod::Embed, GrpcCode::Ok, "a", moment);
    for graph in Graph::ALL {
        metrics.batch(graph, 1, 1, BatchClose::Full);
        metrics.inference(graph, moment);
    }
    for class in Priority::ALL {
        metrics.queued(class, moment);
    }
    metrics.preprocessed(Some(moment), Some(moment));
    metrics.engine_gap(0).record(moment);
    metrics.device_up(0, true);
    metrics.model_loaded("a", "b", "cpu", moment);
    let usage = GpuUsage {
        memory: Some(MemoryUse {
            used_bytes: 1,
            total_bytes: 2,
        }),
        utilization: Some(0.5),
        power_watts: None,
    };
    metrics.gpu(0, usage);
    metrics
}
