//! Downloads from a server with the hub's protocol: one thread with a few
//! files, which records the requests, and misbehaves if a test says so.
#![warn(clippy::disallowed_methods)]
#![allow(
    clippy::unwrap_used,
    reason = "a failure in a test's own work is a failed test"
)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use imagegpt::compile::hub::{Hub, HubTimes};
use imagegpt::compile::{Local, Silent};
use tempfile::TempDir;

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secret";

type Files = &'static [(&'static str, &'static [u8])];

/// Behavior of the server for requests whose path contains a text.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    /// Accepts the request and never answers.
    Silent,
    /// Sends the head, and of the body this number of bytes.
    Stalls(usize),
    /// Closes the connection after this number of bytes of the body.
    Breaks(usize),
    /// Sends one byte per pause.
    Trickles(Duration),
    /// Answers this status with this `x-error-code`.
    Answers(&'static str, &'static str),
    /// Answers this entity tag.
    Tag(&'static str),
}

/// Time limits of the tests.
const TIMES: HubTimes = HubTimes {
    answer: Duration::from_millis(400),
    pause: Duration::from_millis(400),
};
/// Time after which a test says that a download hangs.
const PATIENCE: Duration = Duration::from_secs(30);
const PREPROCESSOR: &[u8] = br#"{"size": 32, "clusters": [[0, 0, 0]]}"#;
const FILES: Files = &[
    ("config.json", b"{}"),
    ("preprocessor_config.json", PREPROCESSOR),
    ("model.safetensors", b"weights of thirty bytes or more"),
];

struct Server {
    hub: Hub,
    asked: Arc<Mutex<Vec<String>>>,
    fault: Arc<Mutex<Option<(&'static str, Fault)>>>,
    _cache: TempDir,
}

fn serve(files: Files) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let cache = TempDir::new().unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let hub = Hub {
        endpoint: Some(format!("http://{}/", listener.local_addr().unwrap())),
        token: Some(TOKEN.to_owned()),
        cache: cache.path().join("hub"),
        offline: None,
        times: TIMES,
    };
    let log = Arc::clone(&asked);
    let fault = Arc::new(Mutex::new(None));
    let faults = Arc::clone(&fault);
    let serve = move || {
        // Connections that never get their answer stay open.
        let mut open = Vec::new();
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            let fault = *faults.lock().unwrap();
            if answer(&stream, files, &log, fault).is_ok_and(|stays| stays) {
                open.push(stream);
            }
        }
    };
    let thread = std::thread::Builder::new().name("hub".to_owned());
    thread.spawn(serve).unwrap();
    Server {
        hub,
        asked,
        fault,
        _cache: cache,
    }
}

/// Answers a request; the result is true if the connection stays open.
fn answer(
    mut stream: &TcpStream,
    files: Files,
    log: &Mutex<Vec<String>>,
    fault: Option<(&'static str, Fault)>,
) -> std::io::Result<bool> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().unwrap()?;
    let path = first.split(' ').nth(1).unwrap().to_owned();
    let (mut start, mut end, mut is_known) = (0, usize::MAX, false);
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if let Some(range) = line.strip_prefix("range: bytes=") {
            let (from, to) = range.split_once('-').unwrap();
            start = from.parse().unwrap();
            end = to.parse().map_or(usize::MAX, |last: usize| last + 1);
        }
        is_known |= line == format!("authorization: bearer {TOKEN}");
        if line.is_empty() {
            break;
        }
    }
    log.lock().unwrap().push(path.clone());
    let fault = fault
        .filter(|(text, _)| path.contains(text))
        .map(|(_, fault)| fault);
    if fault == Some(Fault::Silent) {
        return Ok(true);
    }
    if let Some(Fault::Answers(status, code)) = fault {
        let head = format!("HTTP/1.1 {status}\r\nx-error-code: {code}\r\n");
        write!(
            stream,
            "{head}content-length: 0\r\nconnection: close\r\n\r\n"
        )?;
        return Ok(false);
    }
    let (status, headers, body) = if !is_known {
        ("401 Unauthorized", String::new(), Vec::new())
    } else if path == "/api/models/team/model/revision/main" {
        let names: Vec<String> = files
            .iter()
            .map(|(name, _)| format!(r#"{{"rfilename": "{name}"}}"#))
            .collect();
        let body = format!(r#"{{"sha": "{SHA}", "siblings": [{}]}}"#, names.join(","));
        ("200 OK", String::new(), body.into_bytes())
    } else {
        let found = path
            .strip_prefix(&format!("/team/model/resolve/{SHA}/"))
            .and_then(|name| files.iter().find(|file| file.0 == name));
        match found {
            None => ("404 Not Found", String::new(), Vec::new()),
            Some((name, bytes)) => {
                let part = &bytes[start..end.min(bytes.len())];
                let tag = match fault {
                    Some(Fault::Tag(tag)) => tag.to_owned(),
                    _ => format!("{name}-1"),
                };
                let headers = format!(
                    "content-range: bytes {start}-{}/{}\r\netag: \"{tag}\"\r\n\
                     x-repo-commit: {SHA}\r\n",
                    start + part.len() - 1,
                    bytes.len()
                );
                ("206 Partial Content", headers, part.to_vec())
            }
        }
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    )?;
    // The facts of a file have one byte, with which nothing goes wrong.
    let fault = fault.filter(|_| body.len() > 1);
    match fault {
        Some(Fault::Stalls(n)) => stream.write_all(&body[..n]).map(|()| true),
        Some(Fault::Breaks(n)) => stream.write_all(&body[..n.min(body.len())]).map(|()| false),
        Some(Fault::Trickles(pause)) => {
            for byte in body.chunks(1) {
                stream.write_all(byte)?;
                #[expect(clippy::disallowed_methods, reason = "the server is this slow")]
                std::thread::sleep(pause);
            }
            Ok(false)
        }
        _ => stream.write_all(&body).map(|()| false),
    }
}

impl Server {
    fn goes_wrong(&self, paths: &'static str, fault: Fault) {
        *self.fault.lock().unwrap() = Some((paths, fault));
    }

    fn fetch(&self) -> Result<Local, String> {
        let begin = Instant::now();
        let fetched = self.hub.fetch("team/model", None, &mut Silent);
        assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
        fetched.map_err(|error| error.to_string())
    }

    /// Makes the cached copy that of an older commit with other files.
    fn ages(&self) -> PathBuf {
        let model = self.hub.cache.join("models--team--model");
        let old = model.join("snapshots").join("f".repeat(40));
        fs::create_dir_all(&old).unwrap();
        for (name, content) in FILES {
            fs::write(old.join(name), content).unwrap();
        }
        fs::remove_dir_all(model.join("snapshots").join(SHA)).unwrap();
        fs::remove_dir_all(model.join("blobs")).unwrap();
        fs::write(model.join("refs/main"), "f".repeat(40)).unwrap();
        old
    }
}

fn read(folder: &Path, name: &str) -> Vec<u8> {
    fs::read(folder.join(name)).unwrap()
}

#[test]
fn one_format_of_one_commit_is_downloaded_once() {
    let server = serve(&[
        ("config.json", b"{}"),
        ("preprocessor_config.json", PREPROCESSOR),
        ("README.md", b"not needed"),
        ("model.safetensors", b"weights"),
        ("pytorch_model.bin", b"the same weights"),
    ]);
    let local = server.hub.fetch("team/model", None, &mut Silent).unwrap();
    assert_eq!(local.revision.as_deref(), Some(SHA));
    assert_eq!(read(&local.folder, "model.safetensors"), b"weights");
    assert_eq!(fs::read_dir(&local.folder).unwrap().count(), 3);
    let n_asked = server.asked.lock().unwrap().len();
    assert_eq!(
        server.hub.fetch("team/model", None, &mut Silent).unwrap(),
        local
    );
    assert_eq!(server.asked.lock().unwrap().len(), n_asked + 1);

    let offline = Hub {
        endpoint: Some("http://127.0.0.1:9".to_owned()),
        ..server.hub.clone()
    };
    assert_eq!(
        offline.fetch("team/model", None, &mut Silent).unwrap(),
        local
    );
    let error = offline.fetch("team/other", None, &mut Silent).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("team/other cannot be downloaded")
    );
}

#[test]
fn shards_come_with_their_index() {
    let server = serve(&[
        ("config.json", b"{}"),
        ("preprocessor_config.json", PREPROCESSOR),
        (
            "model.safetensors.index.json",
            br#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}"#,
        ),
        ("1.safetensors", b"one"),
        ("2.safetensors", b"two"),
    ]);
    let local = server.hub.fetch("team/model", None, &mut Silent).unwrap();
    assert_eq!(read(&local.folder, "2.safetensors"), b"two");
    assert_eq!(read(&local.folder, "1.safetensors"), b"one");
}

#[test]
fn what_the_hub_does_not_give_is_told() {
    let server = serve(&[
        ("config.json", b"{}"),
        ("preprocessor_config.json", PREPROCESSOR),
    ]);
    let refused = |hub: &Hub, word: &str| {
        let error = hub
            .fetch("team/model", None, &mut Silent)
            .unwrap_err()
            .to_string();
        assert!(error.contains(word), "{error}");
        assert!(!error.contains(TOKEN), "{error}");
    };
    refused(&server.hub, "neither model.safetensors nor");
    let stranger = Hub {
        token: None,
        ..server.hub.clone()
    };
    // The cache has no weights to fall back to.
    refused(&stranger, "401");
    let server = serve(&[("model.safetensors", b"weights")]);
    refused(&server.hub, "config.json");
}

#[test]
fn a_hub_that_cannot_be_used_now_leaves_the_cached_copy() {
    let server = serve(FILES);
    server.fetch().unwrap();
    let old = server.ages();
    for (paths, fault) in [
        ("/api/", Fault::Silent),
        ("/api/", Fault::Stalls(10)),
        ("/api/", Fault::Answers("503 Service Unavailable", "")),
        ("/api/", Fault::Answers("500 Internal Server Error", "")),
        ("/api/", Fault::Answers("429 Too Many Requests", "")),
        ("/resolve/", Fault::Silent),
        ("/resolve/", Fault::Answers("502 Bad Gateway", "")),
        ("model.safetensors", Fault::Stalls(3)),
        ("model.safetensors", Fault::Stalls(0)),
    ] {
        server.goes_wrong(paths, fault);
        let local = server.fetch().unwrap();
        assert_eq!(local.folder, old);
        assert_eq!(local.revision.unwrap(), "f".repeat(40));
    }
    // A name that has no address, and a port at which nothing listens.
    for endpoint in ["http://hub.invalid", "http://127.0.0.1:9"] {
        let hub = Hub {
            endpoint: Some(endpoint.to_owned()),
            ..server.hub.clone()
        };
        let local = hub.fetch("team/model", None, &mut Silent).unwrap();
        assert_eq!(local.folder, old);
    }
}

#[test]
fn without_a_copy_the_error_names_the_reason_and_the_variable() {
    let server = serve(FILES);
    let unavailable = Fault::Answers("503 Service Unavailable", "");
    for (paths, fault, words) in [
        (
            "/api/",
            Fault::Silent,
            "does not answer within 400ms (HF_HUB_ETAG_TIMEOUT)",
        ),
        (
            "/resolve/",
            Fault::Silent,
            "does not answer within 400ms (HF_HUB_ETAG_TIMEOUT)",
        ),
        (
            "model.safetensors",
            Fault::Stalls(3),
            "nothing for 400ms (HF_HUB_DOWNLOAD_TIMEOUT)",
        ),
        ("/api/", unavailable, "503 Service Unavailable"),
    ] {
        server.goes_wrong(paths, fault);
        let error = server.fetch().unwrap_err();
        assert!(error.contains(words), "{error}");
        let remedy = "no complete copy of revision main to use instead; check the network";
        assert!(error.contains(remedy), "{error}");
    }
}

#[test]
fn a_refusal_is_an_error_whatever_the_cache_has() {
    let server = serve(FILES);
    server.fetch().unwrap();
    let old = server.ages();
    for (status, code, words) in [
        ("401 Unauthorized", "", "no such model, or it is private"),
        (
            "401 Unauthorized",
            "RepoNotFound",
            "no such model, or it is private",
        ),
        ("403 Forbidden", "GatedRepo", "the model is gated"),
        ("403 Forbidden", "", "may not be read"),
        ("404 Not Found", "RevisionNotFound", "has no revision main"),
        (
            "404 Not Found",
            "RepoNotFound",
            "no such model, or it is private",
        ),
        ("400 Bad Request", "", "answered 400"),
    ] {
        server.goes_wrong("/api/", Fault::Answers(status, code));
        let error = server.fetch().unwrap_err();
        assert!(error.contains(words), "{error}");
        let remedy = "HF_HUB_OFFLINE=1 uses the copy of commit ffff";
        assert!(error.contains(remedy), "{error}");
        assert!(!error.contains(TOKEN), "{error}");
    }
    let missing = Fault::Answers("404 Not Found", "EntryNotFound");
    server.goes_wrong("/preprocessor_config", missing);
    let error = server.fetch().unwrap_err();
    assert!(error.contains("has no preprocessor_config.json"), "{error}");
    let offline = Hub {
        offline: Some("HF_HUB_OFFLINE"),
        ..server.hub.clone()
    };
    let local = offline.fetch("team/model", None, &mut Silent).unwrap();
    assert_eq!(local.folder, old);
}

#[test]
fn an_offline_hub_is_not_asked() {
    let server = serve(FILES);
    let local = server.fetch().unwrap();
    server.asked.lock().unwrap().clear();
    let offline = Hub {
        offline: Some("TRANSFORMERS_OFFLINE"),
        ..server.hub.clone()
    };
    let fetch = |name, revision| {
        let fetched = offline.fetch(name, revision, &mut Silent);
        fetched.map_err(|error| error.to_string())
    };
    assert_eq!(fetch("team/model", None).unwrap(), local);
    // A commit is found without a reference.
    assert_eq!(fetch("team/model", Some(SHA)).unwrap(), local);
    for (name, revision) in [("team/other", None), ("team/model", Some("v2"))] {
        let error = fetch(name, revision).unwrap_err();
        assert!(error.contains("TRANSFORMERS_OFFLINE is set"), "{error}");
        assert!(error.contains("HF_HOME"), "{error}");
    }
    // An unfinished copy is none.
    fs::remove_file(local.folder.join("model.safetensors")).unwrap();
    let index = r#"{"weight_map": {"a": "1.safetensors"}}"#;
    fs::write(local.folder.join("model.safetensors.index.json"), index).unwrap();
    fetch("team/model", None).unwrap_err();
    assert!(server.asked.lock().unwrap().is_empty());
}

#[test]
fn a_slow_download_that_goes_on_succeeds() {
    let server = serve(FILES);
    server.goes_wrong("model.safetensors", Fault::Trickles(TIMES.pause / 8));
    let begin = Instant::now();
    let local = server.fetch().unwrap();
    assert!(begin.elapsed() > TIMES.pause + TIMES.answer);
    assert_eq!(read(&local.folder, "model.safetensors"), FILES[2].1);
}

#[test]
fn an_interrupted_download_is_resumed() {
    let server = serve(FILES);
    server.goes_wrong("model.safetensors", Fault::Breaks(8));
    let local = server.fetch().unwrap();
    assert_eq!(read(&local.folder, "model.safetensors"), FILES[2].1);
    let asked = server.asked.lock().unwrap();
    let asked = asked
        .iter()
        .filter(|path| path.ends_with("model.safetensors"));
    // The facts, and 31 bytes in pieces of 8.
    assert_eq!(asked.count(), 5);
}

#[test]
fn an_entity_tag_is_a_name_within_the_cache() {
    let server = serve(FILES);
    for tag in ["../../../owned", "/owned", "a/b", ".", "..", ""] {
        server.goes_wrong("/resolve/", Fault::Tag(tag));
        let error = server.fetch().unwrap_err();
        assert!(error.contains("entity tag"), "{tag}: {error}");
    }
}

#[test]
fn settings_that_cannot_be_served_are_refused_before_the_weights() {
    let server = serve(&[
        ("config.json", b"{}"),
        ("preprocessor_config.json", b"{\"size\": 32}"),
        ("model.safetensors", b"weights"),
    ]);
    let error = server.fetch().unwrap_err();
    assert!(error.contains("clusters is missing"), "{error}");
    let asked = server.asked.lock().unwrap();
    assert!(!asked.iter().any(|path| path.ends_with("safetensors")));
}
