//! Downloads from a server with the hub's protocol: one thread with a few
//! files, which records the requests.
#![warn(clippy::disallowed_methods)]
#![allow(
    clippy::unwrap_used,
    reason = "a failure in a test's own work is a failed test"
)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use imagegpt::compile::Silent;
use imagegpt::compile::hub::Hub;
use tempfile::TempDir;

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secret";

type Files = &'static [(&'static str, &'static [u8])];

struct Server {
    hub: Hub,
    asked: Arc<Mutex<Vec<String>>>,
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
    };
    let log = Arc::clone(&asked);
    let serve = move || {
        for stream in listener.incoming() {
            let _ = answer(&stream.unwrap(), files, &log);
        }
    };
    let thread = std::thread::Builder::new().name("hub".to_owned());
    thread.spawn(serve).unwrap();
    Server {
        hub,
        asked,
        _cache: cache,
    }
}

fn answer(mut stream: &TcpStream, files: Files, log: &Mutex<Vec<String>>) -> std::io::Result<()> {
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
                let headers = format!(
                    "content-range: bytes {start}-{}/{}\r\netag: \"{name}-1\"\r\n\
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
    stream.write_all(&body)
}

fn read(folder: &Path, name: &str) -> Vec<u8> {
    fs::read(folder.join(name)).unwrap()
}

#[test]
fn one_format_of_one_commit_is_downloaded_once() {
    let server = serve(&[
        ("config.json", b"{}"),
        ("preprocessor_config.json", b"{\"size\": 32}"),
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
        ("preprocessor_config.json", b"{}"),
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
    let server = serve(&[("config.json", b"{}"), ("preprocessor_config.json", b"{}")]);
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
