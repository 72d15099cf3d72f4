//! `imagegpt embed` with real processes: workers with the fake engine, whose
//! answers are a function of the image's tokens, and clients that are killed.

#![warn(clippy::disallowed_methods)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::cast::AsArray as _;
use arrow_array::types::{Float32Type, Int64Type};
use arrow_array::{ArrayRef, BinaryArray, Int64Array, RecordBatch, StringArray, StructArray};
use arrow_schema::{DataType, Field};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

use crate::process::{PATIENCE, Worker, said, signal, until};

#[path = "dataset/hub.rs"]
mod hub;
#[path = "dataset/layers.rs"]
mod layers;
#[path = "dataset/lease.rs"]
mod lease;
#[path = "dataset/probe.rs"]
mod probe;
mod process;
#[path = "dataset/retry.rs"]
mod retry;
#[path = "dataset/shards.rs"]
mod shards;
#[path = "dataset/tokens.rs"]
mod tokens;
#[path = "dataset/urls.rs"]
mod urls;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/untrained");

/// Exit codes of the command.
const FAILED: i32 = 1;
const REFUSED: i32 = 2;
const INTERRUPTED: i32 = 5;
const TOO_MANY_ERRORS: i32 = 6;

/// Starts a worker whose runs take the time `cost`.
fn start(cost: &str) -> Worker {
    Worker::start(&["--model", MODEL, "--fake-engine", cost], Stdio::null())
}

/// Returns the number of images that a worker has embedded.
fn answered(worker: &Worker) -> f64 {
    let count = worker.sample("imagegpt_images_total{code=\"OK\"}");
    count.unwrap_or(0.0)
}

/// Returns true if the process has a handler of SIGINT.
fn handles_interrupt(child: &Child) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id()));
    let status = status.expect("a process");
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = u64::from_str_radix(caught.expect("a mask").trim(), 16);
    caught.expect("hexadecimal") & 2 != 0
}

/// Makes the command `imagegpt embed INPUT --output OUTPUT` with these workers.
fn embed(input: &Path, output: &Path, workers: &[Worker]) -> Command {
    let urls: Vec<String> = workers.iter().map(Worker::url).collect();
    let urls = urls.join(",");
    let endpoints = ["--endpoint", &urls];
    let mut command = process::program();
    command
        .args(["embed", "--part-items", "100"])
        .arg(input)
        .arg("--output")
        .arg(output)
        .args(&endpoints[..if workers.is_empty() { 0 } else { 2 }])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Runs a command that must succeed, and returns the JSON that it printed.
fn done(command: &mut Command) -> Value {
    let output = command.output().expect("a run");
    assert!(output.status.success(), "{}", said(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Makes image `n` in a few colors, different for each number; every hundredth
/// file is not an image.
fn image(n: usize) -> Vec<u8> {
    if is_broken(n) {
        return b"no image".to_vec();
    }
    let mut state = u32::try_from(n).expect("few").wrapping_mul(2_654_435_761) + 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        [state.to_le_bytes()[3], state.to_le_bytes()[2], 0]
    };
    let picture = image::RgbImage::from_fn(8, 8, |_, _| image::Rgb(next()));
    let mut file = std::io::Cursor::new(Vec::new());
    picture
        .write_to(&mut file, image::ImageFormat::Png)
        .expect("a PNG");
    file.into_inner()
}

fn is_broken(n: usize) -> bool {
    n % 100 == 42
}

fn id(n: usize) -> String {
    format!("{n:05}")
}

/// Writes images as files.
fn tree(folder: &Path, n_images: usize) -> PathBuf {
    let tree = folder.join("tree");
    std::fs::create_dir(&tree).expect("a folder");
    for n in 0..n_images {
        let path = tree.join(format!("{}.png", id(n)));
        std::fs::write(path, image(n)).expect("a file");
    }
    tree
}

/// Writes the same images as WebDataset shards of `per_shard` images each.
fn tars(folder: &Path, n_images: usize, per_shard: usize) -> PathBuf {
    let tars = folder.join("tars");
    std::fs::create_dir(&tars).expect("a folder");
    for (shard, start) in (0..n_images).step_by(per_shard).enumerate() {
        let file = std::fs::File::create(tars.join(format!("{shard:03}.tar"))).expect("a file");
        let mut builder = tar::Builder::new(file);
        for n in start..(start + per_shard).min(n_images) {
            let mut put = |kind: &str, content: &[u8]| {
                let mut header = tar::Header::new_gnu();
                header.set_size(content.len() as u64);
                header.set_mode(0o644);
                let name = format!("{}.{kind}", id(n));
                builder
                    .append_data(&mut header, name, content)
                    .expect("an entry");
            };
            put("cls", (n % 7).to_string().as_bytes());
            put("png", &image(n));
        }
        builder.finish().expect("a tar");
    }
    tars
}

/// Writes the same images as a table in Hugging Face's layout.
fn table(folder: &Path, n_images: usize) -> PathBuf {
    let images: Vec<Vec<u8>> = (0..n_images).map(image).collect();
    let bytes: BinaryArray = images.iter().map(|image| Some(&image[..])).collect();
    let path: StringArray = images.iter().map(|_| None::<&str>).collect();
    let image = StructArray::from(vec![
        (
            Arc::new(Field::new("bytes", DataType::Binary, true)),
            Arc::new(bytes) as ArrayRef,
        ),
        (
            Arc::new(Field::new("path", DataType::Utf8, true)),
            Arc::new(path) as ArrayRef,
        ),
    ]);
    let name: StringArray = (0..n_images).map(|n| Some(id(n))).collect();
    let label = (0..n_images).map(|n| i64::try_from(n % 7).expect("few"));
    let label = Int64Array::from_iter_values(label);
    let batch = RecordBatch::try_from_iter([
        ("image", Arc::new(image) as ArrayRef),
        ("name", Arc::new(name) as ArrayRef),
        ("label", Arc::new(label) as ArrayRef),
    ])
    .expect("a table");
    let at = folder.join("table.parquet");
    let file = std::fs::File::create(&at).expect("a file");
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).expect("a writer");
    writer.write(&batch).expect("rows");
    writer.close().expect("an end");
    at
}

/// Returns all files below a directory by name, except those that a kill may
/// leave behind.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(folder: &Path, prefix: &str, found: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let entry = entry.expect("an entry");
            let name = entry.file_name().into_string().expect("UTF-8");
            if name.starts_with('.') {
                continue;
            }
            let path = entry.path();
            if path.is_dir() {
                walk(&path, &format!("{prefix}{name}/"), found);
            } else {
                let content = std::fs::read(path).expect("a file");
                found.insert(format!("{prefix}{name}"), content);
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(folder, "", &mut found);
    found
}

/// Returns the rows of the output by id: the vector, and the last column if it
/// is a number.
fn rows(output: &Path) -> BTreeMap<String, (Vec<f32>, Option<i64>)> {
    let mut rows = BTreeMap::new();
    for (name, content) in files(output) {
        if !name.starts_with("part-") {
            continue;
        }
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from(content));
        for batch in reader.expect("Parquet").build().expect("a reader") {
            let batch = batch.expect("rows");
            let vectors = batch.column(1).as_fixed_size_list();
            let last = batch.columns().last().expect("columns");
            for row in 0..batch.num_rows() {
                let vector = vectors.value(row);
                let vector = vector.as_primitive::<Float32Type>().values().to_vec();
                let label = last.as_primitive_opt::<Int64Type>();
                let label = label.map(|labels| labels.value(row));
                let id = batch.column(0).as_string::<i32>().value(row).to_owned();
                let twice = rows.insert(id, (vector, label));
                assert!(twice.is_none(), "an id is there twice");
            }
        }
    }
    rows
}

/// Returns the ids in the error files (dead letters).
fn failed(output: &Path) -> BTreeSet<String> {
    let files = files(output).into_iter();
    let errors = files.filter(|(name, _)| name.starts_with("errors/"));
    errors
        .flat_map(|(_, content)| {
            let text = String::from_utf8(content).expect("UTF-8");
            let lines = text.lines().map(|line| {
                let line: Value = serde_json::from_str(line).expect("JSON");
                assert_eq!(line["code"], "INVALID_ARGUMENT", "{line}");
                line["id"].as_str().expect("an id").to_owned()
            });
            lines.collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn every_layout_gives_the_same_table_and_names_what_is_broken() {
    const IMAGES: usize = 250;
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let workers = [start("0s"), start("0s")];
    let tree = tree(dir.path(), IMAGES);
    let summary = done(&mut embed(&tree, &at("o-tree"), &workers));
    assert_eq!(summary["images"], IMAGES);
    assert_eq!(summary["errors"], 3);
    assert_eq!(summary["finished"], true);
    let from_tree = rows(&at("o-tree"));
    assert_eq!(from_tree.len(), IMAGES - 3);
    let vectors: BTreeSet<Vec<u32>> = from_tree
        .values()
        .map(|(vector, _)| vector.iter().map(|value| value.to_bits()).collect())
        .collect();
    assert_eq!(vectors.len(), IMAGES - 3, "no two images are alike");
    let broken: Vec<String> = (0..IMAGES).filter(|&n| is_broken(n)).map(id).collect();
    let named: Vec<String> = failed(&at("o-tree")).into_iter().collect();
    assert_eq!(
        named,
        broken
            .iter()
            .map(|id| format!("{id}.png"))
            .collect::<Vec<_>>()
    );

    // As a list, as shards, as a table, with labels carried over.
    let lines = (0..IMAGES).map(|n| format!("{},tree/{}.png\n", n % 7, id(n)));
    let list = "label,path\n".to_owned() + &lines.collect::<String>();
    std::fs::write(at("list.csv"), list).expect("a list");
    tars(dir.path(), IMAGES, 120);
    let table = table(dir.path(), IMAGES);
    for (name, input, flags) in [
        ("list", at("list.csv"), &["--keep", "label"][..]),
        ("tar", at("tars/{000..002}.tar"), &["--keep", "cls"]),
        ("table", table, &["--keep", "label", "--id-column", "name"]),
    ] {
        let output = at(&format!("o-{name}"));
        done(embed(&input, &output, &workers).args(flags));
        let rows = rows(&output);
        assert_eq!(rows.len(), from_tree.len(), "{name}");
        for n in (0..IMAGES).filter(|&n| !is_broken(n)) {
            let key = match name {
                "list" => format!("tree/{}.png", id(n)),
                _ => id(n),
            };
            let (vector, label) = &rows[&key];
            assert_eq!(
                vector,
                &from_tree[&format!("{}.png", id(n))].0,
                "{name} {n}"
            );
            // What stands in a CSV is text.
            let expected = (name != "list").then(|| i64::try_from(n % 7).expect("few"));
            assert_eq!(*label, expected, "{name} {n}");
        }
        assert_eq!(failed(&output).len(), 3, "{name}");
    }
    for worker in &workers {
        assert!(answered(worker) > 100.0, "both work");
    }
}

#[test]
fn killed_at_any_moment_the_output_is_the_same_to_the_byte() {
    const IMAGES: usize = 1500;
    const KILLS: u64 = 6;
    let dir = tempfile::tempdir().expect("a folder");
    let input = tars(dir.path(), IMAGES, 600);
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    let mut workers = vec![start("1ms+1ms"), start("1ms+1ms")];
    let flags = ["--item-timeout", "5s", "--keep", "cls"];
    done(embed(&input, &whole, &workers).args(flags));
    let mut random = std::process::id().into();
    for kill in 0..KILLS {
        let mut client = embed(&input, &killed, &workers).args(flags).spawn();
        let client = client.as_mut().expect("a client");
        random = next_random(random);
        process::pause(Duration::from_millis(50 + random % 300));
        if kill % 2 == 0 {
            let worker = workers.remove(0);
            workers.push(worker.kill_and_replace());
            process::pause(Duration::from_millis(random % 200));
        }
        client.kill().expect("a kill");
        client.wait().expect("its end");
    }
    let summary = done(embed(&input, &killed, &workers).args(flags));
    assert_eq!(summary["images"], IMAGES);
    let (whole, killed) = (files(&whole), files(&killed));
    same_files(&whole, &killed);
}

/// Checks that two outputs have the same files to the byte.
fn same_files(whole: &BTreeMap<String, Vec<u8>>, killed: &BTreeMap<String, Vec<u8>>) {
    assert!(
        whole.keys().eq(killed.keys()),
        "{:?} {:?}",
        whole.keys(),
        killed.keys()
    );
    for (name, content) in whole {
        assert!(*content == killed[name], "{name} differs");
    }
}

/// Returns the next pseudo-random number, for the moments of kills.
fn next_random(state: u64) -> u64 {
    let state = state.wrapping_mul(6_364_136_223_846_793_005);
    state.wrapping_add(1_442_695_040_888_963_407) >> 1
}

#[test]
fn shares_write_different_files_and_finish_looks_for_all_of_them() {
    const IMAGES: usize = 450;
    let dir = tempfile::tempdir().expect("a folder");
    let input = tree(dir.path(), IMAGES);
    let (whole, shared) = (dir.path().join("whole"), dir.path().join("shared"));
    let workers = [start("0s")];
    done(&mut embed(&input, &whole, &workers));
    let finish = || {
        let mut command = process::program();
        command.args(["embed", "--finish", "--output"]).arg(&shared);
        command.output().expect("a run")
    };
    assert_eq!(finish().status.code(), Some(REFUSED), "nothing has begun");

    let first = done(embed(&input, &shared, &workers).args(["--shard", "0/2"]));
    assert_eq!(
        (&first["images"], &first["finished"]),
        (&250.into(), &false.into())
    );
    let written: BTreeSet<String> = files(&shared).into_keys().collect();
    let early = finish();
    assert_eq!(early.status.code(), Some(1));
    assert!(
        said(&early).contains("part 00001-00000 and the rest of its shard, part 00003-00000"),
        "{}",
        said(&early)
    );
    let second = done(
        embed(&input, &shared, &workers)
            .args(["--shards", "2"])
            .env("JOB_COMPLETION_INDEX", "1"),
    );
    assert_eq!(second["images"], 200);
    let finished = finish();
    assert!(finished.status.success(), "{}", said(&finished));
    let all = files(&shared);
    assert_eq!(
        written
            .iter()
            .filter(|name| !all.contains_key(*name))
            .count(),
        0
    );
    assert_eq!(all, files(&whole));

    // What somebody deletes is made again.
    std::fs::remove_file(shared.join("part-00001-00000.parquet")).expect("a file");
    assert_eq!(finish().status.code(), Some(1));
    let again = done(&mut embed(&input, &shared, &workers));
    assert_eq!(again["images_this_run"], 100);
    assert_eq!(files(&shared), files(&whole));
}

#[test]
fn what_has_changed_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let input = tree(dir.path(), 120);
    let output = dir.path().join("output");
    let workers = [start("0s")];
    done(&mut embed(&input, &output, &workers));
    let before = files(&output);
    let refused = |command: &mut Command, why: &str| {
        let output = command.output().expect("a run");
        assert_eq!(output.status.code(), Some(REFUSED), "{}", said(&output));
        assert!(said(&output).contains(why), "{}", said(&output));
    };
    refused(
        embed(&input, &output, &workers).args(["--fit", "center-crop"]),
        "--fit was squash, is now center-crop",
    );
    refused(
        embed(&input, &output, &workers).args(["--keep", "label"]),
        "a directory of images, which has no columns",
    );
    refused(
        &mut embed(&input, &input.join("output"), &workers),
        "the next run would read its own output",
    );
    std::fs::write(input.join("99999.png"), image(7)).expect("a file");
    refused(
        &mut embed(&input, &output, &workers),
        "has changed: it was 120 images",
    );
    assert_eq!(files(&output), before);
}

/// Returns id and code of each line in the error files, including those of
/// unfinished parts.
fn error_lines(output: &Path) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    for (name, content) in files(output) {
        if !name.starts_with("errors/") {
            continue;
        }
        for line in String::from_utf8(content).expect("UTF-8").lines() {
            let line: Value = serde_json::from_str(line).expect("JSON");
            let text = |key: &str| line[key].as_str().expect("text").to_owned();
            assert!(!text("message").is_empty());
            lines.push((text("id"), text("code")));
        }
    }
    lines.sort();
    lines
}

#[test]
fn what_cannot_be_read_is_one_error_each_and_the_others_are_done() {
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::symlink;

    let dir = tempfile::tempdir().expect("a folder");
    let input = tree(dir.path(), 20);
    let workers = [start("0s")];
    symlink("gone.png", input.join("nowhere.png")).expect("a link");
    symlink("self.png", input.join("self.png")).expect("a link");
    std::fs::create_dir(input.join("sub")).expect("a folder");
    symlink("..", input.join("sub/up")).expect("a link");
    process::make_pipe(&input.join("pipe.png"));
    let unnamed = std::ffi::OsStr::from_bytes(b"\xff.png");
    std::fs::write(input.join(unnamed), image(1)).expect("a file");
    let output = dir.path().join("output");
    let summary = done(&mut embed(&input, &output, &workers));
    assert_eq!(summary["images"], 25);
    assert_eq!(rows(&output).len(), 20);
    let lines = error_lines(&output);
    let lines: Vec<(&str, &str)> = lines.iter().map(|(id, code)| (&**id, &**code)).collect();
    assert_eq!(
        lines,
        [
            ("%FF.png", "INVALID_ARGUMENT"),
            ("nowhere.png", "NOT_FOUND"),
            ("pipe.png", "FAILED_PRECONDITION"),
            ("self.png", "FAILED_PRECONDITION"),
            ("sub/up", "FAILED_PRECONDITION"),
        ]
    );

    let list = dir.path().join("list.txt");
    let names = [
        "00001.png",
        "nowhere.png",
        "pipe.png",
        "self.png",
        "sub",
        "00002.png",
        "00003.png/x.png",
    ];
    let names = names.map(|name| format!("tree/{name}\n"));
    std::fs::write(&list, names.concat()).expect("a list");
    let listed = dir.path().join("listed");
    done(&mut embed(&list, &listed, &workers));
    assert_eq!(rows(&listed).len(), 2);
    assert_eq!(error_lines(&listed).len(), 5);

    let shards = tars(dir.path(), 20, 10);
    symlink("gone.tar", shards.join("002.tar")).expect("a link");
    let output = dir.path().join("shards");
    done(&mut embed(&shards, &output, &workers));
    assert_eq!(rows(&output).len(), 20);
    let lines = error_lines(&output);
    assert_eq!(lines.len(), 1);
    assert!(lines[0].0.ends_with("tars/002.tar") && lines[0].1 == "NOT_FOUND");
    // One that is named itself is wanted.
    let named = dir.path().join("named");
    let ended = embed(&shards.join("002.tar"), &named, &workers).output();
    assert_eq!(ended.expect("a run").status.code(), Some(REFUSED));
    let ended = embed(&input.join("pipe.png"), &named, &workers).output();
    assert_eq!(ended.expect("a run").status.code(), Some(REFUSED));
}

/// Starts an HTTP server of images whose answer is chosen by the first part of
/// the path; paths below `/later` get 503 the first time.
fn web() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("its address");
    let serve = move || {
        let mut seen = BTreeSet::new();
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut request = [0; 4096];
            let n = stream.read(&mut request).expect("a request");
            let request = String::from_utf8_lossy(&request[..n]);
            let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
            let is_new = seen.insert(path.clone());
            let status = match path.split('/').nth(1).unwrap_or_default() {
                "later" if is_new => "503 Busy",
                "ages" => "503 Busy\r\nretry-after: 18446744073709551615",
                "never" => "429 Slow\r\nretry-after: -1",
                "good" | "later" => "200 OK",
                code => code,
            };
            let content = match status {
                "200 OK" => image(1),
                _ => Vec::new(),
            };
            let head = format!(
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                content.len()
            );
            let answer = [head.as_bytes(), &content].concat();
            std::io::Write::write_all(&mut stream, &answer).expect("a reader");
        }
    };
    std::thread::Builder::new().spawn(serve).expect("a thread");
    addr
}

#[test]
fn an_address_is_an_error_of_its_own_and_a_busy_server_is_asked_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let workers = [start("0s")];
    let (web, nobody) = (web(), {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.local_addr().expect("its address")
    });
    let lines = [
        format!("http://{web}/good/1.png?size=large"),
        format!("http://{web}/400/1.png"),
        format!("http://{web}/410/1.png"),
        format!("http://{web}/500/1.png"),
        format!("http://{web}/later/1.png"),
        format!("http://{nobody}/1.png"),
        "http://nowhere.invalid/1.png".to_owned(),
    ];
    let list = dir.path().join("list.txt");
    let mut text = lines.join("\n").into_bytes();
    text.extend(b"\nhttp://\xff/1.png\n");
    std::fs::write(&list, text).expect("a list");
    let output = dir.path().join("output");
    let summary = done(embed(&list, &output, &workers).args(["--url-patience", "2s"]));
    assert_eq!(
        (&summary["images"], &summary["errors"]),
        (&8.into(), &6.into())
    );
    let read: Vec<String> = rows(&output).into_keys().collect();
    assert_eq!(read, [lines[0].clone(), lines[4].clone()]);
    let codes: BTreeMap<String, String> = error_lines(&output).into_iter().collect();
    let code = |line: &str| codes[line].as_str();
    assert_eq!(code(&lines[1]), "FAILED_PRECONDITION");
    assert_eq!(code(&lines[2]), "NOT_FOUND");
    assert_eq!(code(&lines[3]), "UNAVAILABLE");
    assert_eq!(code(&lines[5]), "UNAVAILABLE");
    // Where there is no name server it may be there the next time.
    assert!(["NOT_FOUND", "UNAVAILABLE"].contains(&code(&lines[6])));
    assert_eq!(code("http://\u{fffd}/1.png"), "INVALID_ARGUMENT");
    // They count as other errors do.
    let few = dir.path().join("few");
    let flags = ["--url-patience", "100ms", "--max-errors", "5"];
    let ended = embed(&list, &few, &workers).args(flags).output();
    let ended = ended.expect("a run");
    assert_eq!(
        ended.status.code(),
        Some(TOO_MANY_ERRORS),
        "{}",
        said(&ended)
    );
}

#[test]
fn a_server_that_asks_for_a_rest_of_ages_is_an_error_of_its_image() {
    let dir = tempfile::tempdir().expect("a folder");
    let workers = [start("0s")];
    let web = web();
    let paths = ["ages", "good", "never"].map(|path| format!("http://{web}/{path}/1.png\n"));
    let list = dir.path().join("list.txt");
    std::fs::write(&list, paths.concat()).expect("a list");
    let output = dir.path().join("output");
    let started = Instant::now();
    let summary = done(embed(&list, &output, &workers).args(["--url-patience", "1s"]));
    assert!(started.elapsed() < PATIENCE / 2);
    assert_eq!(
        (&summary["images"], &summary["errors"]),
        (&3.into(), &2.into())
    );
    // None of this machine's addresses is public, and a proxy's cannot be known.
    let output = dir.path().join("distrusted");
    let mut command = embed(&list, &output, &workers);
    let summary = done(command.arg("--public-addresses-only"));
    assert_eq!(summary["errors"], 3);
    let ended = command.env("HTTP_PROXY", format!("http://{web}")).output();
    let ended = ended.expect("a run");
    assert_eq!(ended.status.code(), Some(REFUSED), "{}", said(&ended));
    assert!(
        said(&ended).contains("HTTP_PROXY is set"),
        "{}",
        said(&ended)
    );
}

/// Writes images as an Arrow file, optionally with a changed number in the
/// footer.
fn arrow(at: &Path, first: usize, change: Option<i64>) {
    let images: Vec<Vec<u8>> = (first..first + 5).map(image).collect();
    let bytes: BinaryArray = images.iter().map(|image| Some(&image[..])).collect();
    let bytes = Arc::new(bytes) as ArrayRef;
    let batch = RecordBatch::try_from_iter([("image", bytes)]).expect("a table");
    let writer = arrow_ipc::writer::FileWriter::try_new(Vec::new(), &batch.schema());
    let mut writer = writer.expect("a writer");
    writer.write(&batch).expect("rows");
    writer.finish().expect("an end");
    let mut content = writer.into_inner().expect("a file");
    if let Some(change) = change {
        let trailer = content.len() - 10;
        let length = content[trailer..].try_into().expect("ten bytes");
        let length = arrow_ipc::reader::read_footer_length(length).expect("a length");
        let footer = arrow_ipc::root_as_footer(&content[trailer - length..trailer]);
        let blocks = footer.expect("a footer").recordBatches().expect("blocks");
        let old = blocks.get(0).bodyLength().to_le_bytes();
        let place = content.windows(8).rposition(|bytes| bytes == old);
        let place = place.expect("the length");
        content[place..place + 8].copy_from_slice(&change.to_le_bytes());
    }
    std::fs::write(at, content).expect("a file");
}

#[test]
fn a_shard_that_lies_is_one_error_and_the_others_are_done() {
    let dir = tempfile::tempdir().expect("a folder");
    let shards = dir.path().join("shards");
    std::fs::create_dir(&shards).expect("a folder");
    for (n, change) in [None, Some(-1), Some(i64::MIN), Some(1 << 45), None]
        .into_iter()
        .enumerate()
    {
        arrow(&shards.join(format!("{n}.arrow")), 5 * n, change);
    }
    let workers = [start("0s")];
    let output = dir.path().join("output");
    let flags = ["--give-up-after", "5s"];
    let summary = done(embed(&shards, &output, &workers).args(flags));
    assert_eq!(
        (&summary["images"], &summary["errors"]),
        (&13.into(), &3.into())
    );
    assert_eq!(rows(&output).len(), 10);
    let lines = error_lines(&output);
    assert_eq!(lines.len(), 3);
    for (line, shard) in lines.iter().zip(["1.arrow", "2.arrow", "3.arrow"]) {
        assert!(line.0.ends_with(shard) && line.1 == "DATA_LOSS", "{line:?}");
    }
    // The journal knows the error, too: a part that is lost is made again, with
    // the same bytes.
    let before = files(&output);
    std::fs::remove_file(output.join("errors/errors-00001-00000.jsonl")).expect("a file");
    done(embed(&shards, &output, &workers).args(flags));
    assert_eq!(files(&output), before);
}

/// Writes a Parquet file with images in the column `column`.
fn parquet_of(at: &Path, column: &str, images: std::ops::Range<usize>) {
    let images: Vec<Vec<u8>> = images.map(image).collect();
    let bytes: BinaryArray = images.iter().map(|image| Some(&image[..])).collect();
    let bytes = Arc::new(bytes) as ArrayRef;
    let batch = RecordBatch::try_from_iter([(column, bytes)]).expect("a table");
    let file = std::fs::File::create(at).expect("a file");
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).expect("a writer");
    writer.write(&batch).expect("rows");
    writer.close().expect("an end");
}

#[test]
fn a_shard_with_other_columns_is_one_error_and_alone_it_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let shards = dir.path().join("shards");
    std::fs::create_dir(&shards).expect("a folder");
    for (n, column) in ["x", "image", "y", "image"].into_iter().enumerate() {
        parquet_of(
            &shards.join(format!("{n}.parquet")),
            column,
            5 * n..5 * n + 5,
        );
    }
    let workers = [start("0s")];
    let output = dir.path().join("output");
    let summary = done(&mut embed(&shards, &output, &workers));
    assert_eq!(
        (&summary["images"], &summary["errors"]),
        (&12.into(), &2.into())
    );
    let lines = error_lines(&output);
    for (line, shard) in lines.iter().zip(["0.parquet", "2.parquet"]) {
        assert!(
            line.0.ends_with(shard) && line.1 == "INVALID_ARGUMENT",
            "{line:?}"
        );
    }
    let alone = embed(
        &shards.join("2.parquet"),
        &dir.path().join("none"),
        &workers,
    )
    .output()
    .expect("a run");
    assert_eq!(alone.status.code(), Some(REFUSED), "{}", said(&alone));
    for part in ["2.parquet", "its columns are y (Binary)", "--image-column"] {
        assert!(said(&alone).contains(part), "{}", said(&alone));
    }
}

/// Runs a command as a user who may not read this test's files; root may read
/// anything.
fn as_nobody(command: &mut Command) -> &mut Command {
    use std::os::unix::fs::MetadataExt as _;
    use std::os::unix::process::CommandExt as _;

    const NOBODY: u32 = 65534;
    let own = std::fs::metadata("/proc/self").expect("this process");
    if own.uid() == 0 {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

#[test]
fn inputs_that_can_never_be_read_end_with_exit_code_2() {
    use std::os::unix::fs::PermissionsExt as _;

    let dir = tempfile::tempdir().expect("a folder");
    let mode = |path: &Path, mode| {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(path, mode).expect("permissions");
    };
    mode(dir.path(), 0o777);
    let input = tree(dir.path(), 2);
    mode(&input, 0);
    let endpoint = ["--endpoint", "http://127.0.0.1:1", "--give-up-after", "1s"];
    let run = |input: &Path, expected: &str| {
        let mut command = embed(input, &dir.path().join("output"), &[]);
        let ended = as_nobody(command.args(endpoint)).output().expect("a run");
        assert_eq!(ended.status.code(), Some(REFUSED), "{}", said(&ended));
        assert!(said(&ended).contains(expected), "{}", said(&ended));
    };
    run(&input, "it is a directory that may not be read");
    run(&input.join("00001.png"), "it may not be read");
    run(Path::new(""), "'' is neither a path");
    mode(&input, 0o700);
}

#[test]
fn an_output_that_cannot_be_written_is_told_before_any_work() {
    let dir = tempfile::tempdir().expect("a folder");
    let input = tree(dir.path(), 2);
    let file = dir.path().join("file");
    std::fs::write(&file, b"").expect("a file");
    // With a worker that is not there, and a model that is not: neither is asked
    // for.
    for worker in [
        ["--endpoint", "http://127.0.0.1:1"],
        ["--model", "/nowhere"],
    ] {
        let ended = process::program()
            .arg("embed")
            .arg(&input)
            .arg("--output")
            .arg(file.join("output"))
            .args(worker)
            .output()
            .expect("a run");
        assert_eq!(ended.status.code(), Some(REFUSED), "{}", said(&ended));
        assert!(said(&ended).contains("--output"), "{}", said(&ended));
    }
    // An input that does not exist is told before the model is looked for, too.
    let ended = process::program()
        .arg("embed")
        .arg(dir.path().join("missing"))
        .arg("--output")
        .arg(dir.path().join("unused"))
        .args(["--model", "/nowhere"])
        .output()
        .expect("a run");
    assert_eq!(ended.status.code(), Some(REFUSED), "{}", said(&ended));
    assert!(said(&ended).contains("missing"), "{}", said(&ended));
    // What may be mended while the output is as it was begun.
    let workers = [start("0s")];
    let output = dir.path().join("output");
    std::fs::create_dir(&output).expect("a folder");
    std::fs::write(output.join("errors"), b"").expect("a file");
    let ended = embed(&input, &output, &workers).output().expect("a run");
    assert_eq!(ended.status.code(), Some(FAILED), "{}", said(&ended));
    std::fs::remove_file(output.join("errors")).expect("a file");
    done(&mut embed(&input, &output, &workers));
}

/// A mistake that every worker would refuse ends the command before a manifest
/// fixes it for the runs to come.
#[test]
fn a_layer_or_an_address_that_cannot_be_is_refused_at_once() {
    let dir = tempfile::tempdir().expect("a folder");
    let input = tree(dir.path(), 2);
    let output = dir.path().join("output");
    let workers = [start("0s")];
    let refused = |command: &mut Command, expected: &str| {
        let ended = command.output().expect("a run");
        assert_eq!(ended.status.code(), Some(REFUSED), "{}", said(&ended));
        assert!(said(&ended).contains(expected), "{}", said(&ended));
        assert!(!output.join("_imagegpt").exists(), "{}", said(&ended));
    };
    refused(
        embed(&input, &output, &workers).args(["--layer", "99"]),
        "--layer 99: the workers' model",
    );
    refused(
        process::program()
            .arg("embed")
            .arg(&input)
            .arg("--output")
            .arg(&output)
            .args(["--endpoint", "grpc://127.0.0.1:50051"]),
        "write http://HOST:PORT",
    );
}

#[test]
fn without_a_worker_it_fails_and_may_be_told_to_end() {
    let dir = tempfile::tempdir().expect("a folder");
    let input = tree(dir.path(), 2);
    let output = dir.path().join("output");
    let job = |patience: &str| {
        let mut command = process::program();
        command
            .arg("embed")
            .arg(&input)
            .arg("--output")
            .arg(&output);
        command.args(["--endpoint", "http://127.0.0.1:1"]);
        command.args(["--give-up-after", patience]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let ended = job("1s").output().expect("a run");
    assert_eq!(ended.status.code(), Some(FAILED), "{}", said(&ended));
    let client = job("1h").spawn().expect("a client");
    until("it handles the signal", || handles_interrupt(&client));
    signal(&client, "-INT");
    let ended = client.wait_with_output().expect("its end");
    assert_eq!(ended.status.code(), Some(INTERRUPTED), "{}", said(&ended));
    let finish = process::program()
        .args(["embed", "--finish", "--output"])
        .arg(&output)
        .output()
        .expect("a run");
    assert_eq!(finish.status.code(), Some(REFUSED), "{}", said(&finish));
}

#[test]
fn too_many_errors_are_all_to_be_read() {
    let dir = tempfile::tempdir().expect("a folder");
    let input = tree(dir.path(), 250);
    let workers = [start("0s")];
    let whole = dir.path().join("whole");
    done(&mut embed(&input, &whole, &workers));
    let output = dir.path().join("output");
    let mut limited = embed(&input, &output, &workers);
    let ended = limited.args(["--max-errors", "1"]).output().expect("a run");
    assert_eq!(
        ended.status.code(),
        Some(TOO_MANY_ERRORS),
        "{}",
        said(&ended)
    );
    assert!(
        said(&ended).contains("the last one is 00"),
        "{}",
        said(&ended)
    );
    let summary: Value = serde_json::from_slice(&ended.stdout).expect("JSON");
    assert_eq!(summary["errors"], error_lines(&output).len(), "{summary}");
    assert_eq!(summary["errors_this_run"], summary["errors"], "{summary}");
    let ids: BTreeSet<String> = error_lines(&output).into_iter().map(|(id, _)| id).collect();
    assert!(ids.len() >= 2, "{ids:?}");
    let known: BTreeSet<String> = [42, 142, 242].map(|n| format!("{}.png", id(n))).into();
    assert!(ids.is_subset(&known), "{ids:?}");
    // The same command ends so again; a higher limit goes on, to the same bytes.
    let ended = limited.output().expect("a run");
    assert_eq!(
        ended.status.code(),
        Some(TOO_MANY_ERRORS),
        "{}",
        said(&ended)
    );
    done(&mut embed(&input, &output, &workers));
    assert_eq!(files(&output), files(&whole));
}

#[test]
fn a_worker_that_hangs_is_left_out() {
    const IMAGES: usize = 600;
    let dir = tempfile::tempdir().expect("a folder");
    let input = tree(dir.path(), IMAGES);
    let output = dir.path().join("output");
    let workers = [start("1ms+1ms"), start("1ms+1ms")];
    let mut command = embed(&input, &output, &workers);
    command.args(["--item-timeout", "1s"]);
    let client = command.spawn().expect("a client");
    until("both work", || {
        workers.iter().all(|worker| answered(worker) > 0.0)
    });
    workers[0].signal("-STOP");
    let ended = client.wait_with_output().expect("its end");
    workers[0].signal("-CONT");
    assert!(ended.status.success(), "{}", said(&ended));
    assert!(said(&ended).contains("no answer in"), "{}", said(&ended));
    assert_eq!(rows(&output).len(), IMAGES - 6);
}

#[test]
fn told_to_end_it_says_how_to_go_on() {
    let dir = tempfile::tempdir().expect("a folder");
    let input = tree(dir.path(), 600);
    let output = dir.path().join("output");
    let workers = [start("5ms+5ms")];
    let client = embed(&input, &output, &workers).spawn().expect("a client");
    until("a part is there", || {
        output.join("part-00000-00000.parquet").exists()
    });
    signal(&client, "-TERM");
    let ended = client.wait_with_output().expect("its end");
    assert_eq!(ended.status.code(), Some(INTERRUPTED), "{}", said(&ended));
    assert!(
        said(&ended).contains("the same command resumes the job"),
        "{}",
        said(&ended)
    );
    let report: Value = serde_json::from_slice(&ended.stdout).expect("JSON");
    assert_eq!(report["outcome"], "interrupted");

    let command = &mut embed(&input, &output, &workers);
    let ended = command.args(["--max-errors", "2"]).output().expect("a run");
    assert_eq!(
        ended.status.code(),
        Some(TOO_MANY_ERRORS),
        "{}",
        said(&ended)
    );
    let summary = done(&mut embed(&input, &output, &workers));
    assert_eq!(summary["errors"], 6);
}

/// A table that is made in the process with a small real model has the results
/// of `imagegpt score` for each image.
#[test]
fn scores_are_those_of_the_command_for_a_few_images() {
    let folder = tempfile::tempdir().expect("a folder");
    let tree = tree(folder.path(), 20);
    let model = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/models/micro-causal"
    );
    let output = folder.path().join("scores");
    let program = || {
        let mut command = process::program();
        command
            .env("IMAGEGPT_CACHE_DIR", folder.path().join("cache"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    };
    let mut embed = program();
    embed
        .args(["embed", "--task", "score", "--model", model])
        .arg(&tree)
        .arg("--output")
        .arg(&output);
    done(&mut embed);
    let mut table = BTreeMap::new();
    for (name, content) in files(&output) {
        if !name.starts_with("part-") {
            continue;
        }
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from(content));
        for batch in reader.expect("Parquet").build().expect("a reader") {
            let batch = batch.expect("rows");
            let ids = batch.column(0).as_string::<i32>();
            let nats = batch.column_by_name("nats").expect("nats");
            let nats = nats.as_primitive::<arrow_array::types::Float64Type>();
            for row in 0..batch.num_rows() {
                table.insert(ids.value(row).to_owned(), nats.value(row));
            }
        }
    }
    assert_eq!(table.len(), 20);
    let score = program()
        .args(["score", "--json", "--model", model])
        .arg(&tree)
        .output()
        .expect("a run");
    let lines = String::from_utf8(score.stdout).expect("UTF-8");
    let mut n_lines = 0;
    for line in lines.lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let file = Path::new(line["file"].as_str().expect("a file"));
        let id = file.file_name().expect("a name").to_str().expect("UTF-8");
        let expected = line["nats"].as_f64().expect("a number");
        let found = table.iter().find(|(known, _)| known.ends_with(id));
        let (_, nats) = found.expect("the same image");
        assert!(
            (nats - expected).abs() <= 1e-4 * expected,
            "{nats} {expected}"
        );
        n_lines += 1;
    }
    assert_eq!(n_lines, 20);
}
