//! Datasets of a hub: a server with the hub's calls and a second one that has
//! the files, as the hub's storage has them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde_json::{Value, json};

use crate::process::{PATIENCE, Worker, said};
use crate::{
    FAILED, REFUSED, done, embed, error_lines, files, id, image, rows, start, table, tars,
};

const FIRST: &str = "1111111111111111111111111111111111111111";
const SECOND: &str = "2222222222222222222222222222222222222222";
const CONVERTED: &str = "3333333333333333333333333333333333333333";
const TOKEN: &str = "hf_secret";
/// Files of a page of a list.
const PAGE: usize = 2;
/// Length from which a file is in the storage and not in git.
const LARGE: usize = 64;

type Tree = BTreeMap<String, Vec<u8>>;

/// Dataset of the server.
#[derive(Default)]
struct Dataset {
    /// Commits by revision.
    revisions: BTreeMap<&'static str, &'static str>,
    commits: BTreeMap<&'static str, Tree>,
    /// True if nobody sees it without the token.
    is_private: bool,
    /// True if its files, but not its lists, need the token.
    is_gated: bool,
}

#[derive(Default)]
struct State {
    datasets: BTreeMap<&'static str, Dataset>,
    /// Answers of 429 that come first, with `Retry-After`.
    busy: Vec<&'static str>,
    /// Paths that were asked for, and whether with a token.
    asked: Vec<(String, bool)>,
    /// The same of the storage.
    stored: Vec<(String, bool)>,
}

#[derive(Clone)]
struct Hub {
    url: String,
    storage: String,
    state: Arc<Mutex<State>>,
}

/// Request line and headers.
struct Request {
    method: String,
    path: String,
    query: String,
    range: Option<(usize, usize)>,
    has_token: bool,
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let method = words.next()?.to_owned();
    let target = words.next()?;
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut request = Request {
        method,
        path: path.to_owned(),
        query: query.to_owned(),
        range: None,
        has_token: false,
    };
    for line in lines {
        let line = line.ok()?;
        let lower = line.to_ascii_lowercase();
        if let Some(range) = lower.strip_prefix("range: bytes=") {
            let (from, to) = range.split_once('-')?;
            request.range = Some((from.parse().ok()?, to.parse().ok()?));
        }
        if lower.starts_with("authorization:") {
            assert!(line.ends_with(&format!("Bearer {TOKEN}")), "{line}");
            request.has_token = true;
        }
        if line.is_empty() {
            break;
        }
    }
    Some(request)
}

fn answer(mut stream: &TcpStream, head: bool, status: &str, headers: &str, body: &[u8]) {
    let text = format!(
        "HTTP/1.1 {status}\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    // A client that is gone needs no answer.
    let _ = stream.write_all(text.as_bytes());
    if !head {
        let _ = stream.write_all(body);
    }
}

fn answer_part(stream: &TcpStream, request: &Request, content: &[u8]) {
    let is_head = request.method == "HEAD";
    match request.range {
        Some((from, _)) if from >= content.len() => {
            let headers = format!("content-range: bytes */{}\r\n", content.len());
            answer(stream, is_head, "416 Range Not Satisfiable", &headers, b"");
        }
        Some((from, to)) => {
            let to = to.min(content.len() - 1);
            let headers = format!("content-range: bytes {from}-{to}/{}\r\n", content.len());
            let part = &content[from..=to];
            answer(stream, is_head, "206 Partial Content", &headers, part);
        }
        None => answer(stream, is_head, "200 OK", "", content),
    }
}

/// Replaces the escapes of a path.
fn unescaped(text: &str) -> String {
    let mut bytes = text.bytes();
    let mut plain = Vec::new();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digits = [bytes.next(), bytes.next()].map(|digit| digit.expect("a digit"));
            let digits = std::str::from_utf8(&digits).expect("ASCII").to_owned();
            plain.push(u8::from_str_radix(&digits, 16).expect("hexadecimal"));
        } else {
            plain.push(byte);
        }
    }
    String::from_utf8(plain).expect("UTF-8")
}

impl Hub {
    fn start(datasets: impl IntoIterator<Item = (&'static str, Dataset)>) -> Self {
        let state = State {
            datasets: datasets.into_iter().collect(),
            ..State::default()
        };
        let listen = || {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let address = listener.local_addr().expect("its address");
            (listener, format!("http://{address}"))
        };
        let ((hub_port, url), (storage_port, storage)) = (listen(), listen());
        let hub = Self {
            url,
            storage,
            state: Arc::new(Mutex::new(state)),
        };
        for (listener, is_storage) in [(hub_port, false), (storage_port, true)] {
            let hub = hub.clone();
            let serve = move || {
                for stream in listener.incoming() {
                    let stream = stream.expect("a connection");
                    let Some(request) = read_request(&stream) else {
                        continue;
                    };
                    if is_storage {
                        hub.store(&stream, &request);
                    } else {
                        hub.answer(&stream, &request);
                    }
                }
            };
            let thread = std::thread::Builder::new().name("hub".to_owned());
            thread.spawn(serve).expect("a thread");
        }
        hub
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no panic")
    }

    fn store(&self, stream: &TcpStream, request: &Request) {
        let mut state = self.state();
        state.stored.push((request.path.clone(), request.has_token));
        let path = unescaped(request.path.trim_start_matches('/'));
        let (commit, path) = path.split_once('/').expect("a commit");
        // Several datasets have the same commit.
        let commits = state.datasets.values().flat_map(|data| &data.commits);
        let content = commits
            .filter(|(known, _)| **known == commit)
            .find_map(|(_, tree)| tree.get(path))
            .expect("a file");
        answer_part(stream, request, content);
    }

    fn answer(&self, stream: &TcpStream, request: &Request) {
        let mut state = self.state();
        let asked = format!("{} {}", request.path, request.query);
        state.asked.push((asked, request.has_token));
        if let Some(rest) = state.busy.pop() {
            let headers = format!("retry-after: {rest}\r\n");
            return answer(stream, false, "429 Too Many Requests", &headers, b"");
        }
        let is_head = request.method == "HEAD";
        let refuse = |status: &str, code: &str| {
            let headers = format!("x-error-code: {code}\r\n");
            answer(stream, is_head, status, &headers, b"{}");
        };
        let is_call = request.path.starts_with("/api/");
        let start = if is_call {
            "/api/datasets/"
        } else {
            "/datasets/"
        };
        let rest = request.path.strip_prefix(start).expect("a call");
        let marks = ["/revision/", "/tree/", "/resolve/"];
        let (mark, (name, rest)) = marks
            .iter()
            .find_map(|mark| Some((*mark, rest.split_once(mark)?)))
            .expect("a call");
        let Some(data) = state.datasets.get(name) else {
            return refuse("401 Unauthorized", "RepoNotFound");
        };
        if data.is_private && !request.has_token {
            return refuse("401 Unauthorized", "RepoNotFound");
        }
        let (revision, path) = rest.split_once('/').unwrap_or((rest, ""));
        let revision = unescaped(revision);
        let commit = match data.revisions.get(revision.as_str()) {
            Some(commit) => *commit,
            None => match data.commits.keys().find(|commit| **commit == revision) {
                Some(commit) => *commit,
                None => return refuse("404 Not Found", "RevisionNotFound"),
            },
        };
        let tree = &data.commits[commit];
        let path = unescaped(path);
        match mark {
            "/revision/" => {
                let info = json!({"id": name, "sha": commit}).to_string();
                answer(stream, is_head, "200 OK", "", info.as_bytes());
            }
            "/tree/" => self.list(stream, request, tree, &path),
            _ if data.is_gated && !request.has_token => {
                refuse("401 Unauthorized", "GatedRepo");
            }
            _ => match tree.get(&path) {
                None => refuse("404 Not Found", "EntryNotFound"),
                Some(content) if content.len() < LARGE => answer_part(stream, request, content),
                Some(content) => {
                    let path = rest.split_once('/').expect("a path").1;
                    let headers = format!(
                        "location: {}/{commit}/{path}\r\nx-linked-size: {}\r\n\
                         x-linked-etag: \"{}\"\r\n",
                        self.storage,
                        content.len(),
                        version(content)
                    );
                    answer(stream, is_head, "302 Found", &headers, b"moved");
                }
            },
        }
    }

    fn list(&self, stream: &TcpStream, request: &Request, tree: &Tree, folder: &str) {
        let prefix = if folder.is_empty() {
            String::new()
        } else {
            format!("{folder}/")
        };
        let found: Vec<_> = tree
            .iter()
            .filter(|(path, _)| path.starts_with(&prefix))
            .collect();
        if found.is_empty() {
            let headers = "x-error-code: EntryNotFound\r\n";
            return answer(stream, false, "404 Not Found", headers, b"{}");
        }
        assert!(
            request.query.contains("recursive=true"),
            "{}",
            request.query
        );
        let cursor = request
            .query
            .split('&')
            .find_map(|one| one.strip_prefix("cursor="));
        let cursor: usize = cursor.map_or(0, |cursor| cursor.parse().expect("a number"));
        let mut page = vec![json!({"type": "directory", "oid": "0", "size": 0, "path": "some"})];
        page.extend(found.iter().skip(cursor).take(PAGE).map(|(path, content)| {
            let mut entry = json!({
                "type": "file", "oid": "git", "size": content.len(), "path": path,
            });
            if content.len() >= LARGE {
                let pointer =
                    json!({"oid": version(content), "size": content.len(), "pointerSize": 1});
                entry["lfs"] = pointer;
            }
            entry
        }));
        let next = cursor + PAGE;
        let headers = if next < found.len() {
            format!(
                "link: <{}{}?recursive=true&expand=false&cursor={next}>; rel=\"next\"\r\n",
                self.url, request.path
            )
        } else {
            String::new()
        };
        let page = Value::from(page).to_string();
        answer(stream, false, "200 OK", &headers, page.as_bytes());
    }
}

/// Makes a name of a content.
fn version(content: &[u8]) -> String {
    let sum = content.iter().fold(7_u64, |sum, &byte| {
        sum.wrapping_mul(31).wrapping_add(byte.into())
    });
    format!("{sum:016x}")
}

/// Makes a dataset whose branch main has these files.
fn dataset(tree: impl IntoIterator<Item = (String, Vec<u8>)>) -> Dataset {
    Dataset {
        revisions: [("main", FIRST)].into(),
        commits: [(FIRST, tree.into_iter().collect())].into(),
        ..Dataset::default()
    }
}

/// Returns the images of a range as files of a directory.
fn pictures(folder: &str, numbers: std::ops::Range<usize>) -> Vec<(String, Vec<u8>)> {
    numbers
        .map(|n| (format!("{folder}{}.png", id(n)), image(n)))
        .collect()
}

/// Makes the command over an input of the hub.
fn job(hub: &Hub, input: &str, output: &Path, workers: &[Worker]) -> Command {
    let mut command = embed(Path::new(input), output, workers);
    command
        .env("HF_ENDPOINT", format!("{}/", hub.url))
        .env("HF_HOME", "/nowhere")
        .env_remove("HF_TOKEN")
        .env_remove("HF_HUB_OFFLINE");
    command
}

fn ends(command: &mut Command, code: i32, texts: &[&str]) -> Output {
    let ended = command.output().expect("a run");
    assert_eq!(ended.status.code(), Some(code), "{}", said(&ended));
    for text in texts {
        assert!(said(&ended).contains(text), "{text}: {}", said(&ended));
    }
    ended
}

/// Returns the files of the table and the errors, which do not name the input.
fn written(output: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = files(output).into_iter();
    files
        .filter(|(name, _)| !name.starts_with("_imagegpt/"))
        .collect()
}

fn commits(output: &Path) -> Vec<(String, String)> {
    let manifest = &files(output)["_imagegpt/manifest.json"];
    let manifest: Value = serde_json::from_slice(manifest).expect("JSON");
    let inputs = manifest["inputs"].as_array().expect("inputs").iter();
    let commits = inputs.filter(|fact| fact["kind"] == "commit");
    let text = |fact: &Value, key: &str| fact[key].as_str().expect("text").to_owned();
    commits
        .map(|fact| (text(fact, "name"), text(fact, "version")))
        .collect()
}

#[test]
fn parquet_files_are_read_and_the_token_stays_with_the_hub() {
    const IMAGES: usize = 150;
    let dir = tempfile::tempdir().expect("a folder");
    let workers = [start("0s")];
    let content = std::fs::read(table(dir.path(), IMAGES)).expect("a file");
    let names = ["data/a.parquet", "data/b c#1.parquet", "other/a.parquet"];
    let mut tree: Tree = names.map(|name| (name.to_owned(), content.clone())).into();
    tree.extend(pictures("pictures/", 0..5));
    tree.insert("README.md".to_owned(), b"words".to_vec());
    let hub = Hub::start([(
        "team/pics",
        Dataset {
            is_private: true,
            ..dataset(tree.clone())
        },
    )]);
    hub.state().busy = vec!["0", "1"];
    let disk = dir.path().join("copy");
    for (name, content) in &tree {
        if name.contains(".parquet") {
            let path = disk.join(name);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            std::fs::write(path, content).expect("a file");
        }
    }
    let at = |name: &str| dir.path().join(name);
    let flags = ["--keep", "label"];
    done(embed(&disk, &at("o-disk"), &workers).args(flags));
    let mut command = job(&hub, "hf://datasets/team/pics", &at("o-hub"), &workers);
    let summary = done(command.args(flags).env("HF_TOKEN", TOKEN));
    assert_eq!(summary["images"], 3 * IMAGES);
    assert_eq!(written(&at("o-hub")), written(&at("o-disk")));
    let expected = ("hf://datasets/team/pics".to_owned(), FIRST.to_owned());
    assert_eq!(commits(&at("o-hub")), [expected]);
    let state = hub.state();
    assert!(state.asked.len() > 8 && state.asked.iter().all(|(_, has)| *has));
    assert!(state.stored.len() >= 3 && state.stored.iter().all(|(_, has)| !has));
    let paged = state
        .asked
        .iter()
        .filter(|(path, _)| path.contains("cursor="));
    assert!(paged.count() >= 4, "every page is read");
    drop(state);

    // A path, which is a directory or a file, and a token that a login has left.
    std::fs::create_dir(at("home")).expect("a folder");
    std::fs::write(at("home").join("token"), format!("{TOKEN}\n")).expect("a file");
    for (name, part, count) in [
        ("o-folder", "data", 2 * IMAGES),
        ("o-file", "data/b c#1.parquet", IMAGES),
        ("o-pictures", "pictures", 5),
    ] {
        let input = format!("hf://datasets/team/pics/{part}");
        let mut command = job(&hub, &input, &at(name), &workers);
        let summary = done(command.env("HF_HOME", at("home")));
        assert_eq!(summary["images"], count, "{part}");
    }
    let ids: Vec<String> = rows(&at("o-pictures")).into_keys().collect();
    assert_eq!(
        ids,
        (0..5).map(|n| format!("{}.png", id(n))).collect::<Vec<_>>()
    );
}

#[test]
fn without_parquet_it_is_the_converted_branch_tar_shards_or_images() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let workers = [start("0s")];
    let content = std::fs::read(table(dir.path(), 120)).expect("a file");
    let tar = std::fs::read(tars(dir.path(), 30, 30).join("000.tar")).expect("a file");
    let script = || ("cats.py".to_owned(), b"import datasets".to_vec());
    let with_branch = |tree: Vec<(String, Vec<u8>)>| {
        let mut data = dataset(tree);
        data.revisions.insert("refs/convert/parquet", CONVERTED);
        let name = "default/test/0000.parquet".to_owned();
        data.commits
            .insert(CONVERTED, [(name, content.clone())].into());
        data
    };
    let one = pictures("", 1..2);
    let hub = Hub::start([
        // As the model card's own example.
        ("cats", with_branch([vec![script()], one.clone()].concat())),
        (
            "team/zip",
            with_branch(vec![("data.zip".to_owned(), vec![0; 99])]),
        ),
        (
            "team/script",
            dataset([vec![("script.py".to_owned(), vec![])], one.clone()].concat()),
        ),
        (
            "team/tars",
            with_branch([vec![("t/0.tar".to_owned(), tar)], one.clone()].concat()),
        ),
        ("team/images", with_branch(pictures("test/cat/", 0..7))),
        ("team/words", dataset([("a.md".to_owned(), vec![1])])),
    ]);
    let summary_of = |name: &str, output: &str, text: &str| {
        let input = format!("hf://datasets/{name}");
        let mut command = job(&hub, &input, &at(output), &workers);
        let ended = ends(&mut command, 0, &[text]);
        let summary: Value = serde_json::from_slice(&ended.stdout).expect("JSON");
        summary["images"].clone()
    };
    let converted = "the files that the hub has converted are read";
    assert_eq!(summary_of("cats", "o-1", converted), 120);
    assert_eq!(summary_of("team/zip", "o-2", converted), 120);
    assert_eq!(summary_of("team/script", "o-3", "image files"), 1);
    assert_eq!(summary_of("team/tars", "o-4", "tar files"), 30);
    assert_eq!(summary_of("team/images", "o-5", "image files"), 7);
    assert_eq!(
        commits(&at("o-1")),
        [
            ("hf://datasets/cats".to_owned(), FIRST.to_owned()),
            (
                "hf://datasets/cats@refs%2Fconvert%2Fparquet".to_owned(),
                CONVERTED.to_owned()
            ),
        ]
    );
    let ids = rows(&at("o-5")).into_keys();
    assert_eq!(ids.collect::<Vec<_>>()[0], "test/cat/00000.png");
    // The same command finds the same commits and has nothing left to do.
    assert_eq!(summary_of("cats", "o-1", "resuming the job"), 120);
    for (input, why) in [
        (
            "team/words",
            "has neither Parquet, Arrow or tar files nor images",
        ),
        ("team/zip@main", "has neither Parquet"),
    ] {
        let input = format!("hf://datasets/{input}");
        ends(
            &mut job(&hub, &input, &at("none"), &workers),
            REFUSED,
            &[why],
        );
    }
    let branch = "hf://datasets/cats@refs/convert/parquet/default/test";
    let summary = done(&mut job(&hub, branch, &at("o-branch"), &workers));
    assert_eq!(summary["images"], 120);
}

#[test]
fn what_is_no_data_is_passed_over_and_a_kind_can_be_chosen() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let workers = [start("0s")];
    let content = std::fs::read(table(dir.path(), 20)).expect("a file");
    let tar = std::fs::read(tars(dir.path(), 6, 6).join("000.tar")).expect("a file");
    let log = "_delta_log/1.checkpoint.parquet".to_owned();
    let mut tree = pictures("pictures/", 0..3);
    tree.push((log, content.clone()));
    let mut mixed = tree.clone();
    mixed.push(("data/a.parquet".to_owned(), content));
    mixed.push(("data/b.tar".to_owned(), tar));
    mixed.push(("c.heic".to_owned(), vec![1]));
    let hub = Hub::start([("team/log", dataset(tree)), ("team/mixed", dataset(mixed))]);
    for (n, (name, flags, images, passed_over)) in [
        ("log", &[][..], 3, 0),
        ("mixed", &[], 20, 1),
        ("mixed", &["--kind", "image"], 3, 0),
        ("mixed", &["--kind", "tar"], 6, 0),
    ]
    .into_iter()
    .enumerate()
    {
        let input = format!("hf://datasets/team/{name}");
        let mut command = job(&hub, &input, &at(&format!("o-{n}")), &workers);
        let summary = done(command.args(flags));
        assert_eq!(summary["images"], images, "{name} {flags:?}");
        assert_eq!(
            summary["passed_over"].as_u64().unwrap_or_default(),
            passed_over,
            "{name} {flags:?}: {summary}"
        );
        let heic = summary["unread"]["heic"].as_u64().unwrap_or_default();
        assert_eq!(heic, u64::from(name == "mixed"), "{summary}");
    }
    let ids: BTreeSet<String> = rows(&at("o-1")).into_keys().collect();
    assert!(ids.contains("data/a.parquet#19"), "{ids:?}");
    let none = ["--kind arrow: the dataset has no files of this kind"];
    let mut command = job(&hub, "hf://datasets/team/mixed", &at("none"), &workers);
    ends(command.args(["--kind", "arrow"]), REFUSED, &none);
}

#[test]
fn a_job_reads_the_commit_at_which_it_began() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let workers = [start("0s")];
    let mut data = dataset(pictures("", 0..250));
    data.commits
        .insert(SECOND, pictures("", 100..200).into_iter().collect());
    let hub = Hub::start([("team/pics", data)]);
    let input = "hf://datasets/team/pics";
    done(&mut job(&hub, input, &at("whole"), &workers));
    done(job(&hub, input, &at("shared"), &workers).args(["--shard", "0/2"]));
    let moved = |state: &mut State| {
        let data = state.datasets.get_mut("team/pics").expect("a dataset");
        data.revisions.insert("main", SECOND);
        state.asked.clear();
    };
    moved(&mut hub.state());
    done(job(&hub, input, &at("shared"), &workers).args(["--shard", "1/2"]));
    let finish = crate::process::program()
        .args(["embed", "--finish", "--output"])
        .arg(at("shared"))
        .output()
        .expect("a run");
    assert!(finish.status.success(), "{}", said(&finish));
    assert_eq!(files(&at("shared")), files(&at("whole")));
    let asked: Vec<String> = hub
        .state()
        .asked
        .iter()
        .map(|(path, _)| path.clone())
        .collect();
    assert!(asked.iter().all(|path| path.contains(FIRST)), "{asked:?}");
    // A new job reads what main is now, and the old commit can be named.
    let now = done(&mut job(&hub, input, &at("now"), &workers));
    assert_eq!(now["images"], 100);
    let named = format!("{input}@{FIRST}");
    let named = done(&mut job(&hub, &named, &at("named"), &workers));
    assert_eq!(named["images"], 250);
    assert_eq!(rows(&at("named")), rows(&at("whole")));
}

#[test]
fn what_the_hub_refuses_is_told_by_name_before_any_work() {
    let dir = tempfile::tempdir().expect("a folder");
    let output = dir.path().join("output");
    let gated = Dataset {
        is_gated: true,
        ..dataset(pictures("", 0..3))
    };
    let private = Dataset {
        is_private: true,
        ..dataset(pictures("", 0..3))
    };
    let hub = Hub::start([
        ("team/gated", gated),
        ("team/private", private),
        ("team/open", dataset(pictures("", 0..3))),
    ]);
    let endpoint = [
        "--endpoint",
        "http://127.0.0.1:1",
        "--give-up-after",
        "100ms",
    ];
    let refused = |input: &str, texts: &[&str]| {
        let mut command = job(&hub, input, &output, &[]);
        ends(command.args(endpoint), REFUSED, texts);
        assert!(!output.join("_imagegpt").exists(), "{input}");
    };
    let gate = ["team/gated is gated", "/datasets/team/gated", "HF_TOKEN"];
    refused("hf://datasets/team/gated", &gate);
    refused("hf://datasets/team/gated/00001.png", &gate);
    let hidden = [
        "has no dataset team/private, or it is private",
        "set HF_TOKEN",
    ];
    refused("hf://datasets/team/private", &hidden);
    refused("hf://datasets/team/none", &["has no dataset team/none"]);
    refused("hf://datasets/none", &["has no dataset none"]);
    refused(
        "hf://datasets/team/open@v9",
        &["team/open has no revision v9"],
    );
    refused("hf://datasets/team/open@a%2Fb", &["has no revision a/b"]);
    refused(
        "hf://datasets/team/open/x/y",
        &["has no file or directory x/y"],
    );
    refused("hf://team/open", &["give hf://datasets/OWNER/NAME"]);
    let before = hub.state().asked.len();
    for (name, value) in [("HF_HUB_OFFLINE", "1"), ("HF_HUB_OFFLINE", "true")] {
        let mut command = job(&hub, "hf://datasets/team/open", &output, &[]);
        ends(
            command.args(endpoint).env(name, value),
            REFUSED,
            &["HF_HUB_OFFLINE is set"],
        );
    }
    let mut command = job(&hub, "hf://datasets/team/open", &output, &[]);
    command.args(endpoint).env("HF_ENDPOINT", "hub.example");
    ends(
        &mut command,
        REFUSED,
        &["HF_ENDPOINT hub.example is not a URL"],
    );
    assert_eq!(hub.state().asked.len(), before, "nothing was asked for");
    // A rest that is longer than the job's patience may pass.
    let started = Instant::now();
    hub.state().busy = vec!["99999"];
    let mut command = job(&hub, "hf://datasets/team/open", &output, &[]);
    let busy = ["the server answered 429", "also after retries for 4m"];
    ends(command.args(endpoint), FAILED, &busy);
    assert!(started.elapsed() < PATIENCE);
}

#[test]
fn a_list_of_the_hub_names_files_beside_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let workers = [start("0s")];
    let mut tree: Tree = pictures("images/", 0..4).into_iter().collect();
    let list = "images/00001.png\nimages/00003.png\nimages/gone.png\n";
    tree.insert(
        "lists/some.txt".to_owned(),
        list.replace("images", "x").into_bytes(),
    );
    tree.insert("some.txt".to_owned(), list.as_bytes().to_vec());
    let hub = Hub::start([("team/pics", dataset(tree))]);
    let output = dir.path().join("output");
    let input = "hf://datasets/team/pics/some.txt";
    done(&mut job(&hub, input, &output, &workers));
    let ids: BTreeSet<String> = rows(&output).into_keys().collect();
    assert_eq!(
        ids,
        ["images/00001.png", "images/00003.png"]
            .map(str::to_owned)
            .into()
    );
    let gone = ("images/gone.png".to_owned(), "NOT_FOUND".to_owned());
    assert_eq!(error_lines(&output), [gone]);
    let output = dir.path().join("lists");
    let input = "hf://datasets/team/pics@main/lists/some.txt";
    done(&mut job(&hub, input, &output, &workers));
    assert_eq!(error_lines(&output).len(), 3);
}
