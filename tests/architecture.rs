//! Invariants of ARCHITECTURE.md that a text search can check: which module may
//! use which, which modules may name a crate, and what no file may contain.
//!
//! Each rule is a function over the files of `src/`, and each has a planted
//! violation that it must find.

#![warn(clippy::disallowed_methods)]
#![expect(
    clippy::print_stdout,
    reason = "what was planted and found is to be read"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Directories and files at the top of `src/`, each of which uses only those
/// before it.
const ORDER: [&str; 16] = [
    "sync",
    "excerpt",
    "nearest",
    "files",
    "telemetry",
    "kernels",
    "probe",
    "imaging",
    "gpu",
    "proto",
    "model",
    "runtime",
    "compile",
    "engine",
    "serve",
    "client",
];
/// Last directory of the order, which may use all others.
const LAST: &str = "commands";

/// Pairs of directories of which the first may not use the second, although the
/// second comes before it.
const FORBIDDEN: [(&str, &str); 18] = [
    ("kernels", "sync"),
    ("kernels", "files"),
    ("kernels", "telemetry"),
    ("probe", "sync"),
    ("probe", "files"),
    ("probe", "telemetry"),
    ("probe", "kernels"),
    ("imaging", "sync"),
    ("imaging", "files"),
    ("imaging", "telemetry"),
    ("imaging", "kernels"),
    ("gpu", "kernels"),
    ("gpu", "imaging"),
    ("engine", "compile"),
    ("serve", "compile"),
    ("client", "serve"),
    ("client", "engine"),
    ("client", "compile"),
];

/// Crates, with the prefixes of the paths that may name them.
const CRATES: [(&str, &[&str]); 20] = [
    ("tonic", &["serve/rpc", "client", "proto"]),
    ("tonic_health", &["serve/rpc"]),
    ("tonic_reflection", &["serve/rpc"]),
    ("tonic_types", &["serve/rpc", "client", "proto"]),
    ("tonic_web", &["serve/rpc"]),
    ("hyper", &["serve/rpc", "serve/http"]),
    ("ort", &["runtime", "engine", "compile/verify"]),
    ("axum", &["serve/http"]),
    ("arrow_array", &["commands"]),
    ("arrow_ipc", &["commands"]),
    ("parquet", &["commands"]),
    ("object_store", &["commands"]),
    ("reqwest", &["commands"]),
    ("hf_hub", &["compile/hub"]),
    ("ureq", &["compile/hub"]),
    ("plotters", &["commands"]),
    ("nvml_wrapper", &["gpu"]),
    ("opentelemetry", &["serve/trace"]),
    ("opentelemetry_sdk", &["serve/trace"]),
    ("opentelemetry_otlp", &["serve/trace"]),
];

/// Stages in their order, each with the neighbors that it may use. The types
/// that pass between stages (`job`, `handoff`, `sequence`) are not stages.
const NEIGHBORS: [(&str, &[&str]); 5] = [
    ("rpc", &["admission"]),
    ("admission", &["preprocess"]),
    ("preprocess", &["batcher"]),
    ("batcher", &[]),
    ("engine_thread", &["batcher"]),
];

/// Files that run on the threads of stages, which must not await.
const ON_THREADS: [&str; 3] = ["serve/preprocess", "serve/batcher", "serve/engine_thread"];

/// Files that may contain unsafe code, each use with its reason.
const UNSAFE: [&str; 16] = [
    "files/scratch",
    "imaging/decode/jpeg/idct/avx2",
    "imaging/resize/avx2",
    "kernels/attention",
    "kernels/layers",
    "kernels/vector",
    "kernels/whole",
    "gpu",
    "engine/onnx/copies",
    "engine/onnx/sequences/cache",
    "runtime/arena",
    "runtime/pages",
    "runtime/placement",
    "runtime/zeros",
    "runtime/operators/quick_gelu",
    "runtime/operators/layers",
];

/// File of `src/`, without its tests.
struct Source {
    /// Path below `src/`, without the extension.
    path: String,
    lines: Vec<(usize, String)>,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        // Tests come last in a file.
        let tests = text
            .match_indices("#[cfg(test)]\n")
            .find(|(at, mark)| {
                let next = text[at + mark.len()..].lines().next().unwrap_or_default();
                next.contains("mod tests {")
            })
            .map_or(text.len(), |(at, _)| at);
        let text = &text[..tests];
        Self {
            path: path.to_owned(),
            lines: text
                .lines()
                .enumerate()
                .map(|(idx, line)| (idx + 1, line.to_owned()))
                .collect(),
        }
    }

    /// Returns the lines of code, without lines that are only comments.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.lines
            .iter()
            .map(|(number, line)| (*number, line.as_str()))
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    fn folder(&self) -> &str {
        self.path.split('/').next().unwrap_or_default()
    }

    /// Returns the paths that the file names, from the crate's root, each with
    /// its line.
    fn paths(&self) -> Vec<(usize, Vec<String>)> {
        let mut found = Vec::new();
        let mut statement = String::new();
        let mut first = 0;
        for (number, line) in self.code() {
            let trimmed = line.trim();
            let begins = trimmed.starts_with("use ")
                || trimmed.starts_with("pub") && trimmed.contains(" use ");
            if statement.is_empty() && begins {
                first = number;
            }
            if begins || !statement.is_empty() {
                statement.push_str(trimmed);
                if trimmed.ends_with(';') {
                    let tree = statement.split("use ").nth(1).unwrap_or_default();
                    for path in expand(tree.trim_end_matches(';')) {
                        found.extend(self.absolute(&path).map(|path| (first, path)));
                    }
                    statement.clear();
                }
                continue;
            }
            for start in ["crate::", "super::"] {
                for (at, _) in line.match_indices(start) {
                    if line[..at]
                        .ends_with(|before: char| before.is_alphanumeric() || before == ':')
                    {
                        continue;
                    }
                    let path: String = line[at..]
                        .chars()
                        .take_while(|c| c.is_alphanumeric() || matches!(c, '_' | ':'))
                        .collect();
                    let path = path.split("::").map(str::to_owned).collect::<Vec<_>>();
                    found.extend(self.absolute(&path).map(|path| (number, path)));
                }
            }
        }
        found
    }

    /// Resolves a path from the crate's root; `None` for paths of other crates.
    fn absolute(&self, path: &[String]) -> Option<Vec<String>> {
        let mut here: Vec<String> = self.path.split('/').map(str::to_owned).collect();
        let mut rest = path;
        match rest.first()?.as_str() {
            "crate" => return Some(rest[1..].to_vec()),
            "self" => rest = &rest[1..],
            "super" => {
                while rest.first().is_some_and(|part| part == "super") {
                    here.pop();
                    rest = &rest[1..];
                }
            }
            _ => return None,
        }
        here.extend(rest.iter().cloned());
        Some(here)
    }
}

/// Returns the paths of a `use` tree.
fn expand(tree: &str) -> Vec<Vec<String>> {
    let Some((prefix, inner)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or_default().trim();
        return vec![
            path.split("::")
                .map(|part| part.trim().to_owned())
                .collect(),
        ];
    };
    let inner = inner.rsplit_once('}').map_or(inner, |(inner, _)| inner);
    let prefix: Vec<String> = prefix
        .split("::")
        .map(|part| part.trim().to_owned())
        .filter(|part| !part.is_empty())
        .collect();
    let mut parts = vec![String::new()];
    let mut depth = 0;
    for c in inner.chars() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(String::new());
                continue;
            }
            _ => {}
        }
        parts.last_mut().expect("one at least").push(c);
    }
    parts
        .iter()
        .filter(|part| !part.trim().is_empty())
        .flat_map(|part| expand(part.trim()))
        .map(|path| [prefix.clone(), path].concat())
        .collect()
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path
                .strip_prefix(&root)
                .expect("below src")
                .with_extension("");
            let name = name.to_str().expect("UTF-8").to_owned();
            let is_source = path.extension().is_some_and(|extension| extension == "rs");
            let is_other = ["lib", "main"].contains(&name.as_str()) || name.ends_with("tests");
            if is_source && !is_other {
                let text = std::fs::read_to_string(&path).expect("a source");
                found.push(Source::new(&name, &text));
            }
        }
    }
    assert!(found.len() > 100, "src/ is where it was");
    found
}

fn place(folder: &str) -> usize {
    let known = ORDER.iter().position(|known| *known == folder);
    known.unwrap_or(ORDER.len())
}

/// Returns the text of a violation, with its line.
fn told(source: &Source, line: usize, what: impl std::fmt::Display) -> String {
    format!("src/{}.rs:{line}: {what}", source.path)
}

fn folders_use_only_those_before_them(sources: &[Source]) -> Vec<String> {
    let mut bad = Vec::new();
    for source in sources {
        let from = source.folder();
        if place(from) == ORDER.len() && from != LAST {
            bad.push(told(source, 1, format!("{from} has no place in the order")));
        }
        for (line, path) in source.paths() {
            let Some(to) = path.first().map(String::as_str) else {
                continue;
            };
            if from == to || to == "cfg" {
                continue;
            }
            if place(to) > place(from) || FORBIDDEN.contains(&(from, to)) {
                bad.push(told(
                    source,
                    line,
                    format!("{from} uses {}", path.join("::")),
                ));
            }
        }
    }
    bad
}

fn crates_are_known_where_they_may_be(sources: &[Source]) -> Vec<String> {
    let mut bad = Vec::new();
    for source in sources {
        for (name, places) in CRATES {
            if places.iter().any(|place| source.path.starts_with(place)) {
                continue;
            }
            let path = format!("{name}::");
            for (line, text) in source.code() {
                let names = text.match_indices(&path).any(|(at, _)| {
                    !text[..at]
                        .ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | ':' | '"'))
                });
                if names {
                    bad.push(told(source, line, format!("{name} is not known here")));
                }
            }
        }
    }
    bad
}

fn stages_know_only_their_neighbors(sources: &[Source]) -> Vec<String> {
    let stages: Vec<&str> = NEIGHBORS.iter().map(|(stage, _)| *stage).collect();
    let mut bad = Vec::new();
    for source in sources {
        let mut parts = source.path.split('/').skip(1);
        let own = parts.next().unwrap_or_default();
        if source.folder() != "serve" || own == "worker" {
            continue;
        }
        let neighbors = NEIGHBORS.iter().find(|(stage, _)| *stage == own);
        for (line, path) in source.paths() {
            let (Some(folder), Some(to)) = (path.first(), path.get(1)) else {
                continue;
            };
            let to = to.as_str();
            if folder != "serve" || to == own || !stages.contains(&to) {
                continue;
            }
            // The pages show how full the worker is.
            if own == "http" && to == "admission" {
                continue;
            }
            if neighbors.is_none_or(|(_, known)| !known.contains(&to)) {
                bad.push(told(source, line, format!("{own} uses the stage {to}")));
            }
        }
    }
    bad
}

/// Finds modules that use each other in a cycle: directories, and the files of
/// `serve`.
fn modules_have_no_circles(sources: &[Source]) -> Vec<String> {
    fn unit(path: &[impl AsRef<str>]) -> Option<String> {
        let first = path.first()?.as_ref();
        if first != "serve" {
            return Some(first.to_owned());
        }
        Some(format!("serve::{}", path.get(1)?.as_ref()))
    }
    let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in sources {
        let own: Vec<&str> = source.path.split('/').collect();
        let Some(from) = unit(&own) else { continue };
        for (_, path) in source.paths() {
            if let Some(to) = unit(&path).filter(|to| *to != from) {
                uses.entry(from.clone()).or_default().insert(to);
            }
        }
    }
    let reaches = |from: &str| {
        let mut seen: BTreeSet<&str> = BTreeSet::new();
        let mut next: Vec<&str> = vec![from];
        while let Some(unit) = next.pop() {
            for to in uses.get(unit).into_iter().flatten() {
                if seen.insert(to) {
                    next.push(to);
                }
            }
        }
        seen.contains(from)
    };
    let circles: Vec<String> = uses
        .keys()
        .filter(|unit| reaches(unit))
        .map(|unit| format!("{unit} uses itself through others"))
        .collect();
    println!(
        "modules: {}, of them in circles: {}",
        uses.len(),
        circles.len()
    );
    circles
}

/// Finds lines with one of `words` in the files below `below`.
fn without(sources: &[Source], below: &[&str], words: &[&str], why: &str) -> Vec<String> {
    let mut bad = Vec::new();
    for source in sources {
        if !below.iter().any(|place| source.path.starts_with(place)) {
            continue;
        }
        for (line, text) in source.code() {
            if let Some(word) = words.iter().find(|word| text.contains(**word)) {
                bad.push(told(source, line, format!("{word}: {why}")));
            }
        }
    }
    bad
}

fn channels_are_bounded(sources: &[Source]) -> Vec<String> {
    let words = ["unbounded(", "unbounded_channel", "mpsc::channel()"];
    without(sources, &[""], &words, "a channel without a bound")
}

fn threads_have_names(sources: &[Source]) -> Vec<String> {
    let why = "a thread without a name: std::thread::Builder has one";
    without(sources, &[""], &["thread::spawn"], why)
}

/// Finds uses of `ort::init`, which panics when the library is missing.
fn a_missing_runtime_is_no_panic(sources: &[Source]) -> Vec<String> {
    without(sources, &[""], &["ort::init("], "panics without a library")
}

fn threads_of_stages_do_not_await(sources: &[Source]) -> Vec<String> {
    without(
        sources,
        &ON_THREADS,
        &[".await", "async "],
        "awaits on a stage's thread",
    )
}

fn nothing_unwraps(sources: &[Source]) -> Vec<String> {
    without(sources, &[""], &[".unwrap()"], "unwraps outside of tests")
}

fn unsafe_code_is_where_it_may_be(sources: &[Source]) -> Vec<String> {
    let mut bad = Vec::new();
    for source in sources {
        if UNSAFE.iter().any(|place| source.path.starts_with(place)) {
            continue;
        }
        for (line, text) in source.code() {
            let has = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"]
                .iter()
                .any(|word| text.contains(word));
            if has {
                bad.push(told(source, line, "unsafe code"));
            }
        }
    }
    bad
}

/// Kernels in plain code, whose closures need no instructions.
const PLAIN: [&str; 2] = ["kernels/vector", "kernels/whole/plain"];

/// Finds closures over arrays in the kernels' innermost files. The closure may
/// become a function without the instructions of the function around it: one such
/// line made attention in bfloat16 five times slower than in floats.
fn innermost_loops_have_no_closures(sources: &[Source]) -> Vec<String> {
    let mut bad = Vec::new();
    for source in sources {
        let is_innermost = source
            .lines
            .iter()
            .any(|(_, line)| line.contains("clippy::inline_always"));
        let is_plain = PLAIN.contains(&source.path.as_str());
        if !source.path.starts_with("kernels/") || !is_innermost || is_plain {
            continue;
        }
        for (line, text) in source.code() {
            let on_array = text.split(".map(").next().filter(|before| *before != text);
            let on_array = on_array.is_some_and(|before| {
                before.ends_with(|c: char| c == ']' || c == '_' || c.is_alphanumeric())
            });
            if on_array || text.contains("array::from_fn(") {
                bad.push(told(source, line, "a closure over an array: write a loop"));
            }
        }
    }
    bad
}

/// Finds names of status codes as strings. Codes are `GrpcCode`, and their
/// names belong to its definition; the Open Inference Protocol has a state with
/// the name of a code.
fn codes_are_no_strings(sources: &[Source]) -> Vec<String> {
    let words = [
        "\"CANCELLED\"",
        "\"INVALID_ARGUMENT\"",
        "\"DEADLINE_EXCEEDED\"",
        "\"NOT_FOUND\"",
        "\"PERMISSION_DENIED\"",
        "\"RESOURCE_EXHAUSTED\"",
        "\"FAILED_PRECONDITION\"",
        "\"ABORTED\"",
        "\"UNIMPLEMENTED\"",
        "\"INTERNAL\"",
        "\"UNAVAILABLE\"",
        "\"DATA_LOSS\"",
    ];
    let is_elsewhere =
        |path: &str| !["proto/code", "serve/rpc/oip", "serve/rpc/status"].contains(&path);
    let elsewhere: Vec<Source> = sources
        .iter()
        .filter(|source| is_elsewhere(&source.path))
        .map(|source| Source {
            path: source.path.clone(),
            lines: source.lines.clone(),
        })
        .collect();
    without(&elsewhere, &[""], &words, "a code as a string")
}

/// Words that a doc comment may not begin with: pronouns and relative clauses, which
/// do not stand alone in generated documentation or in `--help`.
const OPENINGS: [&str; 21] = [
    "And", "As", "How", "It", "Its", "Of", "See", "So", "Such", "That", "These", "They", "Those",
    "What", "Whatever", "When", "Where", "Whether", "Which", "Who", "Whoever",
];

fn doc_comments_stand_alone(sources: &[Source]) -> Vec<String> {
    let mut bad = Vec::new();
    let mut seen = 0;
    for source in sources {
        let mut within = false;
        for (number, line) in &source.lines {
            let line = line.trim_start();
            let text = line
                .strip_prefix("///")
                .or_else(|| line.strip_prefix("//!"));
            let Some(text) = text else {
                within = false;
                continue;
            };
            if !std::mem::replace(&mut within, true) {
                seen += 1;
                let first = text.split_whitespace().next().unwrap_or_default();
                let word = first.trim_end_matches(|c: char| !c.is_alphanumeric());
                if OPENINGS.contains(&word) {
                    bad.push(told(source, *number, format!("begins with {word}")));
                }
            }
        }
    }
    println!("{} of {seen} doc comments begin with a pronoun", bad.len());
    bad
}

type Rule = fn(&[Source]) -> Vec<String>;

#[track_caller]
fn holds(rule: Rule, planted: &[(&str, &str)]) {
    let bad = rule(&sources());
    assert!(bad.is_empty(), "\n{}", bad.join("\n"));
    for (path, text) in planted {
        let mut all = sources();
        all.retain(|source| source.path != *path);
        all.push(Source::new(path, text));
        let found = rule(&all);
        assert!(!found.is_empty(), "not found: {text}");
        println!("planted: {}", found.join("; "));
    }
}

#[test]
fn folders() {
    let planted = [
        ("imaging/planted", "use crate::serve::{error::Error, job};"),
        ("model/planted", "fn f() { crate::engine::onnx::load(); }"),
        ("serve/planted", "pub use super::super::compile::compile;"),
        ("kernels/planted", "use crate::files;"),
        ("probe/planted", "use crate::kernels::vector::Vector;"),
        ("engine/planted", "use crate::{compile, proto};"),
        ("elsewhere/planted", ""),
    ];
    holds(folders_use_only_those_before_them, &planted);
}

#[test]
fn crates() {
    holds(
        crates_are_known_where_they_may_be,
        &[
            ("serve/planted", "use tonic::Status;"),
            ("serve/batcher/planted", "fn f() -> ort::Result<()> {"),
            ("commands/planted", "use axum::Router;"),
            ("serve/planted", "use parquet::file::reader::FileReader;"),
        ],
    );
}

#[test]
fn stages() {
    holds(
        stages_know_only_their_neighbors,
        &[
            ("serve/rpc/planted", "use crate::serve::batcher::Batcher;"),
            ("serve/cache", "use super::admission::Admission;"),
        ],
    );
}

#[test]
fn circles() {
    holds(
        modules_have_no_circles,
        &[("serve/job", "use crate::serve::engine_thread::run;")],
    );
}

#[test]
fn channels() {
    let text = "let (a, b) = crossbeam_channel::unbounded();";
    holds(channels_are_bounded, &[("serve/planted", text)]);
}

#[test]
fn threads() {
    let text = "    std::thread::spawn(move || work());";
    holds(threads_have_names, &[("serve/planted", text)]);
}

#[test]
fn runtime() {
    let text = "    let built = ort::init().build();";
    holds(a_missing_runtime_is_no_panic, &[("runtime/planted", text)]);
}

#[test]
fn awaits() {
    let text = "    let turn = turns.recv().await;";
    holds(
        threads_of_stages_do_not_await,
        &[("serve/engine_thread/planted", text)],
    );
}

#[test]
fn unwraps() {
    holds(
        nothing_unwraps,
        &[("client/planted", "let x = y.unwrap();")],
    );
}

#[test]
fn unsafe_code() {
    let text = "    unsafe { *pointer }";
    holds(unsafe_code_is_where_it_may_be, &[("serve/planted", text)]);
}

#[test]
fn closures() {
    let planted = "reason = \"clippy::inline_always\"\nlet r = [0, 1].map(|j| load(j));";
    holds(
        innermost_loops_have_no_closures,
        &[("kernels/planted", planted)],
    );
}

#[test]
fn codes() {
    let text = "    let code = \"UNAVAILABLE\";";
    holds(codes_are_no_strings, &[("client/planted", text)]);
}

#[test]
fn sentences() {
    let planted = [
        ("serve/planted", "/// Those that live.\nstruct Planted;"),
        ("serve/planted", "//! What bulk is owed."),
        ("model/planted", "    /// See the module.\n    fn f() {}"),
    ];
    holds(doc_comments_stand_alone, &planted);
}
