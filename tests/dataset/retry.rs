//! Errors of a finished job that are tried again: new parts beside the old ones,
//! each image a row or an error, and the same bytes after kills.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arrow_array::{ArrayRef, BinaryArray, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use serde_json::Value;

use crate::process::{self, said};
use crate::{
    REFUSED, TOO_MANY_ERRORS, Worker, as_nobody, done, embed, error_lines, files, image,
    next_random, parquet_of, rows, same_files, start,
};

const IMAGES: usize = 230;

/// Server of images, of which 3 in 10 fail while it is busy, and one in 10 does
/// not exist.
struct Web {
    addr: SocketAddr,
    is_busy: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<usize>>>,
}

fn fails_while_busy(n: usize) -> bool {
    [2, 4, 8].contains(&(n % 10))
}

fn is_missing(n: usize) -> bool {
    n % 10 == 7
}

impl Web {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = listener.local_addr().expect("its address");
        let is_busy = Arc::new(AtomicBool::new(true));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (busy, seen) = (Arc::clone(&is_busy), Arc::clone(&asked));
        let answer = move |path: &str| -> (&str, Vec<u8>) {
            let n: usize = path.trim_matches('/').parse().expect("a number");
            seen.lock().expect("a lock").push(n);
            match n {
                n if fails_while_busy(n) && busy.load(Ordering::SeqCst) => ("503 Busy", Vec::new()),
                n if is_missing(n) => ("404 Missing", Vec::new()),
                n => ("200 OK", image(n)),
            }
        };
        let serve = move || {
            for stream in listener.incoming() {
                let mut stream = stream.expect("a connection");
                let mut request = [0; 4096];
                // A client that was killed has nothing to say.
                let Ok(read @ 1..) = stream.read(&mut request) else {
                    continue;
                };
                let request = String::from_utf8_lossy(&request[..read]);
                let (status, content) = answer(request.split(' ').nth(1).expect("a path"));
                let length = content.len();
                let head = format!(
                    "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
                );
                let _ = stream.write_all(&[head.as_bytes(), &content].concat());
            }
        };
        std::thread::Builder::new().spawn(serve).expect("a thread");
        Self {
            addr,
            is_busy,
            asked,
        }
    }

    fn list(&self, dir: &Path) -> PathBuf {
        let lines = (0..IMAGES).map(|n| format!("{n},http://{}/{n}\n", self.addr));
        let list = dir.join("list.csv");
        let text = "id,url\n".to_owned() + &lines.collect::<String>();
        std::fs::write(&list, text).expect("a list");
        list
    }

    fn calms_down(&self) {
        self.is_busy.store(false, Ordering::SeqCst);
        self.asked.lock().expect("a lock").clear();
    }

    /// Returns the numbers of the images that were asked for since the server
    /// calmed down.
    fn asked(&self) -> BTreeSet<usize> {
        let asked = self.asked.lock().expect("a lock");
        asked.iter().copied().collect()
    }
}

/// Makes the command of a job over a list of URLs.
fn job(list: &Path, output: &Path, workers: &[Worker]) -> Command {
    let mut command = embed(list, output, workers);
    command.args(["--id-column", "id", "--url-patience", "100ms"]);
    command
}

/// Returns the numbers of the images with a row, after checking that no image
/// has two, and that each image has a row or an error.
fn images(output: &Path, errors: usize) -> BTreeSet<usize> {
    let rows: BTreeSet<usize> = rows(output)
        .into_keys()
        .map(|id| id.parse().expect("a number"))
        .collect();
    let failed = error_lines(output);
    assert_eq!(failed.len(), errors, "{failed:?}");
    let failed: BTreeSet<usize> = failed
        .into_iter()
        .map(|(id, _)| id.parse().expect("a number"))
        .collect();
    let mut all: Vec<usize> = rows.iter().chain(&failed).copied().collect();
    all.sort_unstable();
    assert!(all.into_iter().eq(0..IMAGES), "each image is there once");
    rows
}

/// Checks the rows and errors of a job's report.
#[track_caller]
fn counts(summary: &Value, rows: u64, errors: u64) {
    let told = (summary["rows"].as_u64(), summary["errors"].as_u64());
    assert_eq!(told, (Some(rows), Some(errors)), "{summary}");
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status();
    assert!(copied.expect("cp").success());
}

fn refused(command: &mut Command, words: &str) {
    let ended = command.output().expect("a run");
    assert_eq!(ended.status.code(), Some(REFUSED), "{}", said(&ended));
    assert!(said(&ended).contains(words), "{}", said(&ended));
}

/// Checks that a table that was there before is there with the same bytes.
fn tables_stay(before: &BTreeMap<String, Vec<u8>>, after: &BTreeMap<String, Vec<u8>>) {
    for (name, content) in before {
        if name.ends_with(".parquet") {
            assert!(after.get(name) == Some(content), "{name}");
        }
    }
}

#[test]
fn errors_of_a_code_are_tried_again_and_nothing_else() {
    let dir = tempfile::tempdir().expect("a folder");
    let workers = [start("0s")];
    let web = Web::start();
    let list = web.list(dir.path());
    let output = dir.path().join("output");
    let busy = (0..IMAGES).filter(|&n| fails_while_busy(n)).count();
    let missing = (0..IMAGES).filter(|&n| is_missing(n)).count();
    let invalid = 2
        - (0..IMAGES)
            .filter(|&n| n % 100 == 42 && fails_while_busy(n))
            .count();
    let summary = done(&mut job(&list, &output, &workers));
    assert_eq!(summary["errors"], busy + missing + invalid);
    let before = files(&output);
    images(&output, busy + missing + invalid);

    web.calms_down();
    let summary = done(job(&list, &output, &workers).arg("--retry-errors=unavailable"));
    // Two images are not images, and were not reached before.
    let left = missing + 2;
    assert_eq!(summary["images"], IMAGES);
    assert_eq!(summary["errors"], left);
    assert_eq!(summary["rows"], IMAGES - left);
    assert_eq!(summary["images_this_run"], busy);
    assert_eq!(summary["finished"], true);
    let asked: Vec<usize> = (0..IMAGES).filter(|&n| fails_while_busy(n)).collect();
    assert!(
        web.asked().into_iter().eq(asked),
        "nothing else was asked for"
    );
    let after = files(&output);
    tables_stay(&before, &after);
    assert!(after.contains_key("part-00001-00000-retry1-00000.parquet"));
    let found = images(&output, left);
    assert!(
        (0..IMAGES)
            .filter(|&n| fails_while_busy(n) && n % 100 != 42)
            .all(|n| found.contains(&n))
    );

    // Another round for what is left, which fails again; then for no error.
    web.calms_down();
    let summary = done(job(&list, &output, &workers).arg("--retry-errors"));
    assert_eq!(summary["errors"], left);
    let asked: Vec<usize> = (0..IMAGES)
        .filter(|&n| is_missing(n) || n % 100 == 42)
        .collect();
    assert!(web.asked().into_iter().eq(asked));
    assert_eq!(images(&output, left), found);
    tables_stay(&after, &files(&output));
    web.calms_down();
    let after = files(&output);
    let summary = done(job(&list, &output, &workers).arg("--retry-errors=UNAVAILABLE"));
    assert_eq!(
        (&summary["errors"], &summary["images_this_run"]),
        (&left.into(), &0.into())
    );
    assert_eq!(files(&output), after);
    // The job itself is still the same, and is done; so says `--finish`.
    let again = done(&mut job(&list, &output, &workers));
    assert_eq!(again["sha256"], summary["sha256"]);
    let finish = [
        "embed",
        "--finish",
        "--output",
        output.to_str().expect("UTF-8"),
    ];
    assert_eq!(done(process::program().args(finish))["errors"], left);
    assert!(web.asked().is_empty());
}

#[test]
fn a_retry_that_is_killed_has_the_same_bytes() {
    const KILLS: usize = 5;
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let mut workers = vec![start("1ms+1ms"), start("1ms+1ms")];
    let web = Web::start();
    let list = web.list(dir.path());
    let retry = |output: &Path, workers: &[Worker]| {
        let mut command = job(&list, output, workers);
        command.args(["--item-timeout", "5s", "--retry-errors"]);
        command
    };
    done(&mut job(&list, &at("killed"), &workers));
    copy(&at("killed"), &at("whole"));
    web.calms_down();
    let errors = &done(&mut retry(&at("whole"), &workers))["errors"];
    let errors = usize::try_from(errors.as_u64().expect("a number")).expect("few");
    let mut random = std::process::id().into();
    let mut has_ended = false;
    for kill in 0..KILLS {
        let mut client = retry(&at("killed"), &workers).spawn().expect("a client");
        random = next_random(random);
        process::pause(Duration::from_millis(30 + random % 150));
        if kill % 2 == 0 {
            let worker = workers.remove(0);
            workers.push(worker.kill_and_replace());
        }
        has_ended = client.try_wait().expect("a state").is_some();
        client.kill().expect("a kill");
        client.wait().expect("its end");
        if has_ended {
            break;
        }
    }
    if !has_ended {
        done(&mut retry(&at("killed"), &workers));
    }
    let (whole, killed) = (files(&at("whole")), files(&at("killed")));
    images(&at("killed"), errors);
    // A kill after the last record and before the end has the next command
    // begin another round.
    if killed.contains_key("_imagegpt/retries/00002.json") {
        return;
    }
    same_files(&whole, &killed);
}

#[test]
fn a_shard_that_could_not_be_read_is_read_from_where_it_ended() {
    use std::os::unix::fs::PermissionsExt as _;

    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let mode = |path: &Path, mode| {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(path, mode).expect("permissions");
    };
    mode(dir.path(), 0o777);
    let shards = at("shards");
    std::fs::create_dir(&shards).expect("a folder");
    parquet_of(&shards.join("a.parquet"), "image", 0..30);
    parquet_of(&shards.join("b.parquet"), "image", 30..250);
    mode(&shards.join("b.parquet"), 0);
    let workers = [start("0s")];
    let run = |flags: &[&str]| {
        let mut command = embed(&shards, &at("output"), &workers);
        done(as_nobody(command.args(flags)))
    };
    let summary = run(&[]);
    counts(&summary, 30, 1);
    let summary = run(&["--retry-errors"]);
    counts(&summary, 30, 1);
    mode(&shards.join("b.parquet"), 0o644);
    let summary = run(&["--retry-errors"]);
    // Three of the images are not images.
    counts(&summary, 247, 3);
    assert_eq!(rows(&at("output")).len(), 247);
    let errors: Vec<String> = error_lines(&at("output"))
        .into_iter()
        .map(|(id, _)| id)
        .collect();
    assert_eq!(errors, ["b.parquet#112", "b.parquet#12", "b.parquet#212"]);
    assert!(at("output/part-00001-00000-retry2-00002.parquet").exists());
    // Nothing of it is read twice.
    let summary = run(&["--retry-errors"]);
    counts(&summary, 247, 3);
    assert_eq!(summary["images_this_run"], 3);
    assert_eq!(rows(&at("output")).len(), 247);
}

/// Writes an Arrow file of two batches, the second of which takes some 3 MB.
fn heavy(at: &Path) {
    let batch = |numbers: std::ops::Range<usize>, padding: usize| {
        let files = numbers.map(|n| [image(n), vec![0; padding]].concat());
        let column: ArrayRef = Arc::new(BinaryArray::from_iter_values(files));
        RecordBatch::try_from_iter([("image", column)]).expect("a batch")
    };
    let (light, heavy) = (batch(0..20, 0), batch(50..80, 100_000));
    let file = std::fs::File::create(at).expect("a file");
    let writer = arrow_ipc::writer::FileWriter::try_new(file, &light.schema());
    let mut writer = writer.expect("a writer");
    writer.write(&light).expect("rows");
    writer.write(&heavy).expect("rows");
    writer.finish().expect("an end");
}

#[test]
fn what_did_not_fit_into_memory_is_read_with_more_of_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    heavy(&at("a.arrow"));
    let workers = [start("0s")];
    let run = |flags: &[&str]| {
        let mut command = embed(&at("a.arrow"), &at("output"), &workers);
        done(command.args(flags))
    };
    let summary = run(&["--image-memory", "1MiB"]);
    counts(&summary, 20, 1);
    let summary = run(&[
        "--retry-errors=RESOURCE_EXHAUSTED",
        "--image-memory",
        "2MiB",
    ]);
    counts(&summary, 20, 1);
    let summary = run(&["--retry-errors=RESOURCE_EXHAUSTED"]);
    counts(&summary, 50, 0);
    assert!(error_lines(&at("output")).is_empty());
    let ids: BTreeSet<String> = (0..50).map(|row| format!("a.arrow#{row}")).collect();
    assert!(rows(&at("output")).into_keys().eq(ids));
}

#[test]
fn a_retry_that_cannot_be_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let workers = [start("0s")];
    let web = Web::start();
    let list = web.list(dir.path());
    let ended = job(&list, &at("output"), &workers)
        .args(["--max-errors", "10"])
        .output();
    let ended = ended.expect("a run");
    assert_eq!(
        ended.status.code(),
        Some(TOO_MANY_ERRORS),
        "{}",
        said(&ended)
    );
    let retry = |flag: &str| {
        let mut command = job(&list, &at("output"), &workers);
        command.arg(flag);
        command
    };
    refused(
        &mut retry("--retry-errors"),
        "run the same command without --retry-errors first",
    );
    refused(&mut retry("--retry-errors=SLOW"), "names of gRPC codes");
    done(&mut job(&list, &at("output"), &workers));
    // A round that another command began goes on with its own codes.
    let note = at("output/_imagegpt/retries/00001.json");
    std::fs::create_dir(note.parent().expect("a folder")).expect("a folder");
    std::fs::write(&note, "{\"codes\":[\"NOT_FOUND\"]}\n").expect("a file");
    refused(
        &mut retry("--retry-errors"),
        "retry 1 of this job was begun with --retry-errors=NOT_FOUND and is not finished",
    );
    done(&mut retry("--retry-errors=NOT_FOUND"));
}

#[test]
fn parts_of_a_version_that_recorded_no_rows_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let output = dir.path().join("output");
    let workers = [start("0s")];
    let list = Web::start().list(dir.path());
    done(&mut job(&list, &output, &workers));
    let record = output.join("_imagegpt/journal/00001-00000.json");
    let text = std::fs::read(&record).expect("a file");
    let mut value: Value = serde_json::from_slice(&text).expect("JSON");
    let removed = value
        .as_object_mut()
        .expect("an object")
        .remove("error_rows");
    assert!(removed.is_some());
    std::fs::write(&record, value.to_string()).expect("a file");
    refused(
        job(&list, &output, &workers).arg("--retry-errors"),
        "part 00001-00000 was made by an older imagegpt, which did not record which rows failed",
    );
    // Without a retry the output is what it was.
    done(&mut job(&list, &output, &workers));
}

#[test]
fn a_part_with_a_lost_file_is_done_again_with_its_retries() {
    let dir = tempfile::tempdir().expect("a folder");
    let output = dir.path().join("output");
    let workers = [start("0s")];
    let web = Web::start();
    let list = web.list(dir.path());
    done(&mut job(&list, &output, &workers));
    web.calms_down();
    let summary = done(job(&list, &output, &workers).arg("--retry-errors"));
    let left = usize::try_from(summary["errors"].as_u64().expect("a number")).expect("few");
    images(&output, left);
    for lost in [
        "part-00001-00000-retry1-00000.parquet",
        "part-00000-00000.parquet",
        "errors/errors-00002-00000-retry1-00000.jsonl",
    ] {
        std::fs::remove_file(output.join(lost)).expect("a file");
        refused(
            job(&list, &output, &workers).arg("--retry-errors"),
            "the job is not finished",
        );
        done(&mut job(&list, &output, &workers));
        images(&output, left);
    }
    // What a kill leaves of a part without a record does not stay.
    let stray = output.join("part-00002-00000-retry7-00000.parquet");
    std::fs::copy(output.join("part-00000-00000.parquet"), &stray).expect("a copy");
    done(&mut job(&list, &output, &workers));
    assert!(!stray.exists());
    images(&output, left);
}

#[test]
fn shares_try_their_own_errors_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let output = dir.path().join("output");
    let workers = [start("0s")];
    let web = Web::start();
    let list = web.list(dir.path());
    let share = |share: &str, flags: &[&str]| {
        let mut command = job(&list, &output, &workers);
        done(command.args(["--shard", share]).args(flags))
    };
    share("0/2", &[]);
    web.calms_down();
    // The other share has not begun.
    let first = share("0/2", &["--retry-errors=UNAVAILABLE"]);
    web.is_busy.store(true, Ordering::SeqCst);
    share("1/2", &[]);
    web.calms_down();
    let second = share("1/2", &["--retry-errors=UNAVAILABLE"]);
    let number = |value: &Value| usize::try_from(value.as_u64().expect("a number")).expect("few");
    let errors = number(&first["errors"]) + number(&second["errors"]);
    images(&output, errors);
    let finish = [
        "embed",
        "--finish",
        "--output",
        output.to_str().expect("UTF-8"),
    ];
    assert_eq!(done(process::program().args(finish))["errors"], errors);
}

#[test]
fn a_retry_that_reads_on_goes_on_after_a_kill() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    heavy(&at("a.arrow"));
    let slow = [start("100ms+10ms")];
    let run = |workers: &[Worker], flags: &[&str]| {
        let mut command = process::program();
        command
            .args(["embed", "--part-items", "5"])
            .arg(at("a.arrow"))
            .arg("--output")
            .arg(at("output"))
            .args(["--endpoint", &workers[0].url()])
            .args(flags)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        command
    };
    done(&mut run(&slow, &["--image-memory", "1MiB"]));
    let mut client = run(&slow, &["--retry-errors"]).spawn().expect("a client");
    // The first piece of what could not be read is recorded, and others are not.
    process::until("a recorded piece", || {
        at("output/_imagegpt/journal/00000-00003-retry1-00000.json").exists()
    });
    client.kill().expect("a kill");
    client.wait().expect("its end");
    let summary = done(&mut run(&slow, &["--retry-errors"]));
    counts(&summary, 50, 0);
    assert_eq!(rows(&at("output")).len(), 50);
}

#[test]
fn parts_after_a_lost_one_are_done_again_without_a_row_twice() {
    let dir = tempfile::tempdir().expect("a folder");
    let output = dir.path().join("output");
    let workers = [start("0s")];
    let web = Web::start();
    let list = web.list(dir.path());
    // A table is one shard, whose parts follow each other.
    let table = dir.path().join("urls.parquet");
    let text = std::fs::read_to_string(&list).expect("a list");
    let urls = text
        .lines()
        .skip(1)
        .filter_map(|line| line.split(',').nth(1));
    let ids: ArrayRef = Arc::new(StringArray::from_iter_values(
        (0..IMAGES).map(|n| n.to_string()),
    ));
    let urls: ArrayRef = Arc::new(StringArray::from_iter_values(urls));
    let batch = RecordBatch::try_from_iter([("id", ids), ("url", urls)]).expect("a table");
    let file = std::fs::File::create(&table).expect("a file");
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).expect("a writer");
    writer.write(&batch).expect("rows");
    writer.close().expect("an end");
    let run = |output: &Path, flags: &[&str]| {
        let mut command = job(&table, output, &workers);
        done(command.args(["--url-column", "url"]).args(flags))
    };
    run(&output, &[]);
    web.calms_down();
    let left = run(&output, &["--retry-errors"]);
    let left = usize::try_from(left["errors"].as_u64().expect("a number")).expect("few");
    images(&output, left);
    for lost in [
        "part-00000-00000.parquet",
        "part-00000-00001-retry1-00000.parquet",
        "_imagegpt/journal/00000-00000.json",
    ] {
        let damaged = dir.path().join(lost.replace('/', "-"));
        copy(&output, &damaged);
        std::fs::remove_file(damaged.join(lost)).expect("a file");
        run(&damaged, &[]);
        images(&damaged, left);
        run(&damaged, &["--retry-errors"]);
        images(&damaged, left);
    }
}

#[test]
fn a_command_that_was_killed_at_its_end_begins_no_other_round() {
    let dir = tempfile::tempdir().expect("a folder");
    let output = dir.path().join("output");
    let workers = [start("0s")];
    let web = Web::start();
    let list = web.list(dir.path());
    done(&mut job(&list, &output, &workers));
    web.calms_down();
    let retry = || done(job(&list, &output, &workers).arg("--retry-errors"));
    let first = retry();
    let whole = files(&output);
    // As a kill leaves it after the last record.
    for name in ["retries/00001-ended-0-of-1.json", "summary.json"] {
        std::fs::remove_file(output.join("_imagegpt").join(name)).expect("a file");
    }
    web.calms_down();
    let again = retry();
    assert!(web.asked().is_empty());
    assert_eq!(again["sha256"], first["sha256"]);
    assert_eq!(files(&output), whole);
    retry();
    assert!(output.join("_imagegpt/retries/00002.json").exists());
}

#[test]
fn too_many_errors_of_a_retry_stand_in_one_file_each() {
    let dir = tempfile::tempdir().expect("a folder");
    let output = dir.path().join("output");
    let workers = [start("0s")];
    let list = Web::start().list(dir.path());
    let summary = done(&mut job(&list, &output, &workers));
    let errors = summary["errors"].as_u64().expect("a number");
    for flags in [
        &["--retry-errors", "--max-errors", "3"][..],
        &["--max-errors", "3"],
    ] {
        let ended = job(&list, &output, &workers).args(flags).output();
        let ended = ended.expect("a run");
        assert_eq!(
            ended.status.code(),
            Some(TOO_MANY_ERRORS),
            "{}",
            said(&ended)
        );
        let said: Value = serde_json::from_slice(&ended.stdout).expect("JSON");
        assert_eq!(said["errors"], errors, "{said}");
        images(&output, usize::try_from(errors).expect("few"));
    }
}

#[test]
fn files_of_somebody_else_are_not_replaced() {
    let dir = tempfile::tempdir().expect("a folder");
    let output = dir.path().join("output");
    let workers = [start("0s")];
    let list = Web::start().list(dir.path());
    std::fs::create_dir(&output).expect("a folder");
    let theirs = output.join("part-00007-00000.parquet");
    std::fs::write(&theirs, "theirs").expect("a file");
    refused(
        &mut job(&list, &output, &workers),
        "has the file part-00007-00000.parquet, which no job there has made",
    );
    assert_eq!(std::fs::read(&theirs).expect("a file"), b"theirs");
    std::fs::rename(&theirs, output.join("theirs.parquet")).expect("a file");
    done(&mut job(&list, &output, &workers));
    // A record that somebody has written over stays one, whatever is tried.
    let record = output.join("_imagegpt/journal/00000-00000.json");
    std::fs::write(&record, "{").expect("a file");
    refused(
        &mut job(&list, &output, &workers),
        "00000-00000.json is not a record of imagegpt embed",
    );
}
