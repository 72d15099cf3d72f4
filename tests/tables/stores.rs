//! Buckets and web servers: odd keys, cold objects, presigned URLs, credentials.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::process::said;
use crate::server::{Answer, Object, bucket, serve};
use crate::{
    FAILED, REFUSED, command, done, embed, errors, ids, image, parquet, refused, table, worker,
};

/// Lets a command read a bucket of the test.
fn at_bucket(command: &mut Command, addr: SocketAddr) -> &mut Command {
    command
        .env("AWS_ENDPOINT", format!("http://{addr}"))
        .env("AWS_ALLOW_HTTP", "true")
        .env("AWS_ACCESS_KEY_ID", "KEY")
        .env("AWS_SECRET_ACCESS_KEY", "secret")
        .env("AWS_REGION", "us-east-1")
}

fn content(bytes: Vec<u8>) -> Object {
    Object::Content(bytes)
}

/// Makes the content of a Parquet file.
fn parquet_bytes(numbers: std::ops::Range<u8>) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("t.parquet");
    parquet(&path, &[table(numbers, &[])], None);
    std::fs::read(path).expect("a file")
}

#[test]
fn a_key_that_no_path_can_have_is_one_error() {
    let dir = tempfile::tempdir().expect("a folder");
    let worker = worker();
    let png = || content(image(1));
    let table = || content(parquet_bytes(0..2));
    let objects = BTreeMap::from([
        ("dbl/a.png".to_owned(), png()),
        ("dbl//b.png".to_owned(), png()),
        ("dots/a.png".to_owned(), png()),
        ("dots/../b.png".to_owned(), png()),
        ("dots/./c.png".to_owned(), png()),
        ("tables/a.parquet".to_owned(), table()),
        ("tables//b.parquet".to_owned(), table()),
    ]);
    let addr = bucket(objects);
    for (prefix, good, bad) in [
        ("dbl", &["a.png"][..], &["/b.png"][..]),
        ("dots", &["a.png"], &["../b.png", "./c.png"]),
        (
            "tables",
            &["a.parquet#0", "a.parquet#1"],
            &["s3://b/tables//b.parquet"],
        ),
    ] {
        let output = dir.path().join(prefix);
        done(at_bucket(
            &mut embed(&[format!("s3://b/{prefix}")], &output, &worker),
            addr,
        ));
        assert_eq!(ids(&output), good, "{prefix}");
        let lines = errors(&output);
        assert_eq!(lines.keys().collect::<Vec<_>>(), bad, "{prefix}");
        for (code, message) in lines.values() {
            assert_eq!(code, "INVALID_ARGUMENT");
            assert!(message.contains("cannot be requested"), "{message}");
        }
    }
}

#[test]
fn an_object_in_cold_storage_is_one_error() {
    let dir = tempfile::tempdir().expect("a folder");
    let worker = worker();
    let objects = BTreeMap::from([
        ("images/a.png".to_owned(), content(image(1))),
        ("images/b.png".to_owned(), Object::Cold(100)),
        ("tables/a.parquet".to_owned(), content(parquet_bytes(0..2))),
        ("tables/b.parquet".to_owned(), Object::Cold(5000)),
        ("tars/b.tar".to_owned(), Object::Cold(5000)),
    ]);
    let addr = bucket(objects);
    for (prefix, rows, bad) in [
        ("images", 1, "b.png"),
        ("tables", 2, "s3://b/tables/b.parquet"),
        ("tars", 0, "s3://b/tars/b.tar"),
    ] {
        let output = dir.path().join(prefix);
        let mut command = embed(&[format!("s3://b/{prefix}")], &output, &worker);
        let summary = done(at_bucket(&mut command, addr));
        assert_eq!(summary["rows"], rows, "{prefix}");
        let (code, message) = &errors(&output)[bad];
        assert_eq!(code, "FAILED_PRECONDITION");
        assert!(message.contains("cold storage"), "{message}");
    }
}

#[test]
fn a_bucket_that_is_not_there_or_forbidden_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let addr = bucket(BTreeMap::new());
    let output = dir.path().join("o");
    for (input, key) in [
        ("s3://b/t.parquet", "OTHER"),
        ("s3://b/x", "OTHER"),
        ("s3://c/x", "KEY"),
    ] {
        let mut command = command(&[input], &output);
        at_bucket(&mut command, addr).env("AWS_ACCESS_KEY_ID", key);
        refused(&mut command, &output, &[]);
    }
}

#[test]
fn a_list_in_a_bucket_leads_nowhere_else() {
    let dir = tempfile::tempdir().expect("a folder");
    let worker = worker();
    let list = "a.png\n../other/b.png\nsub//c.png\n./d.png\nS3://b/lists/a.png\n";
    let objects = BTreeMap::from([
        ("lists/l.txt".to_owned(), content(list.as_bytes().to_vec())),
        ("lists/a.png".to_owned(), content(image(1))),
        ("other/b.png".to_owned(), content(image(1))),
    ]);
    let addr = bucket(objects);
    let output = dir.path().join("o");
    done(at_bucket(
        &mut embed(&["S3://b/lists/l.txt"], &output, &worker),
        addr,
    ));
    assert_eq!(ids(&output), ["a.png", "S3://b/lists/a.png"]);
    let lines = errors(&output);
    assert_eq!(
        lines.keys().collect::<Vec<_>>(),
        ["../other/b.png", "./d.png", "sub//c.png"]
    );
    assert!(
        lines.values().all(|(code, _)| code == "INVALID_ARGUMENT"),
        "{lines:?}"
    );
}

#[test]
fn credentials_are_those_of_the_profile_or_missing_at_once() {
    let dir = tempfile::tempdir().expect("a folder");
    let worker = worker();
    let objects = BTreeMap::from([("x/a.png".to_owned(), content(image(1)))]);
    let addr = bucket(objects);
    let home = dir.path().join("home");
    std::fs::create_dir_all(home.join(".aws")).expect("a folder");
    let run = |output: &str, profile: Option<&str>| {
        let mut command = embed(&["s3://b/x"], &dir.path().join(output), &worker);
        command
            .env("HOME", &home)
            .env("AWS_ENDPOINT", format!("http://{addr}"))
            .env("AWS_ALLOW_HTTP", "true")
            .env("AWS_ACCESS_KEY_ID", "")
            .env("AWS_METADATA_ENDPOINT", "http://192.0.2.1");
        if let Some(profile) = profile {
            command.env("AWS_PROFILE", profile);
        }
        command
    };
    let started = Instant::now();
    let words = ["no credentials", "AWS_ACCESS_KEY_ID", "AWS_PROFILE"];
    refused(&mut run("o-none", None), &dir.path().join("o-none"), &words);
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
    let words = ["AWS_PROFILE other: the profile has no aws_access_key_id"];
    refused(
        &mut run("o-none", Some("other")),
        &dir.path().join("o-none"),
        &words,
    );
    let credentials = "[default]\naws_access_key_id = WRONG\naws_secret_access_key = s\n\n\
                       [other]\naws_access_key_id = KEY\naws_secret_access_key = a/b+c=\n\
                       aws_session_token = token\n";
    std::fs::write(home.join(".aws/credentials"), credentials).expect("a file");
    refused(
        &mut run("o-wrong", None),
        &dir.path().join("o-wrong"),
        &["InvalidAccessKeyId"],
    );
    done(&mut run("o-other", Some("other")));
    assert_eq!(ids(&dir.path().join("o-other")), ["a.png"]);
    // The default one, in the file of the configuration.
    std::fs::remove_file(home.join(".aws/credentials")).expect("a file");
    let config = "[default]\nregion = eu-west-1\naws_access_key_id = KEY\n\
                  aws_secret_access_key = s\n";
    std::fs::write(home.join(".aws/config"), config).expect("a file");
    done(&mut run("o-default", None));
    assert_eq!(ids(&dir.path().join("o-default")), ["a.png"]);
}

/// Compresses a body as a web server does.
fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content).expect("memory");
    encoder.finish().expect("memory")
}

#[test]
fn a_body_that_is_compressed_for_the_way_is_decoded() {
    let dir = tempfile::tempdir().expect("a folder");
    let worker = worker();
    let bomb = gzip(&vec![0; 200 << 20]);
    let web = serve(move |request| {
        let (body, encoding) = match request.path.as_str() {
            "/gzip.png" => (gzip(&image(1)), "gzip"),
            "/plain.png" => (image(1), "identity"),
            "/stated.png" => (image(1), "gzip"),
            "/br.png" => (b"x".to_vec(), "br"),
            "/bomb.png" => (bomb.clone(), "gzip"),
            "/l.txt" => (
                gzip(b"gzip.png\nplain.png\nstated.png\nbr.png\nbomb.png\n"),
                "gzip",
            ),
            _ => return Answer::new("404 Not Found", ""),
        };
        Answer::new("200 OK", body).with("content-encoding", encoding)
    });
    let output = dir.path().join("o");
    done(&mut embed(
        &[format!("http://{web}/l.txt")],
        &output,
        &worker,
    ));
    assert_eq!(ids(&output), ["gzip.png", "plain.png", "stated.png"]);
    let lines = errors(&output);
    assert!(
        lines["br.png"].1.contains("compressed with br"),
        "{lines:?}"
    );
    assert!(lines["bomb.png"].1.contains("over the limit"), "{lines:?}");
}

#[test]
fn a_server_without_ranges_is_an_error_and_one_without_head_is_read() {
    let dir = tempfile::tempdir().expect("a folder");
    let worker = worker();
    let file = parquet_bytes(0..2);
    let web = serve(move |request| {
        let signed = request.query.contains("X-Amz-Signature=good");
        match request.path.as_str() {
            "/whole/t.parquet" | "/whole/t.tar" => Answer::new("200 OK", file.clone()),
            "/no-head/t.parquet" if request.method == "HEAD" => Answer::new("403 Forbidden", ""),
            "/signed/t.parquet" if !signed || request.method == "HEAD" => {
                Answer::new("403 Forbidden", "")
            }
            "/no-head/t.parquet" | "/signed/t.parquet" => Answer::file(request, &file),
            _ => Answer::new("404 Not Found", ""),
        }
    });
    for name in ["t.parquet", "t.tar"] {
        let url = format!("http://{web}/whole/{name}");
        let output = dir.path().join(name);
        done(&mut embed(&[&url], &output, &worker));
        let (code, message) = &errors(&output)[&url];
        assert_eq!(code, "FAILED_PRECONDITION");
        assert!(
            message.contains("requests for a range of bytes"),
            "{message}"
        );
    }
    let output = dir.path().join("no-head");
    done(&mut embed(
        &[format!("http://{web}/no-head/t.parquet")],
        &output,
        &worker,
    ));
    assert_eq!(ids(&output), ["t.parquet#0", "t.parquet#1"]);

    let output = dir.path().join("signed");
    let url = |signature: &str| {
        format!("http://{web}/signed/t.parquet?X-Amz-Expires=9&X-Amz-Signature={signature}")
    };
    done(&mut embed(&[url("good")], &output, &worker));
    assert_eq!(ids(&output), ["t.parquet#0", "t.parquet#1"]);
    // A new signature is the same input.
    let summary = done(&mut embed(&[url("good2")], &output, &worker));
    assert_eq!(summary["images_this_run"], 0);
    let output = dir.path().join("forged");
    refused(&mut embed(&[url("bad")], &output, &worker), &output, &[]);
}

#[test]
fn a_bucket_that_fails_on_the_way_may_be_asked_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let worker = worker();
    let file = parquet_bytes(0..2);
    // Credentials that expire after the listing.
    let addr = serve(move |request| {
        if request.method == "HEAD" {
            return Answer::file(request, &file);
        }
        Answer::new("403 Forbidden", "<Error><Code>ExpiredToken</Code></Error>")
    });
    let output = dir.path().join("o");
    let mut command = embed(&["s3://b/t.parquet"], &output, &worker);
    let ended = at_bucket(&mut command, addr).output().expect("a run");
    assert_eq!(ended.status.code(), Some(FAILED), "{}", said(&ended));
    assert!(said(&ended).contains("ExpiredToken"), "{}", said(&ended));
}

#[test]
fn errors_are_retried_into_a_bucket() {
    let dir = tempfile::tempdir().expect("a folder");
    let worker = worker();
    let is_busy = Arc::new(AtomicBool::new(true));
    let busy = Arc::clone(&is_busy);
    let web = serve(move |request| {
        if request.path.contains('1') && busy.load(Ordering::SeqCst) {
            return Answer::new("503 Busy", "");
        }
        Answer::file(request, &image(1))
    });
    let lines = (0..4).map(|n| format!("http://{web}/{n}.png\n"));
    let list = dir.path().join("list.txt");
    std::fs::write(&list, lines.collect::<String>()).expect("a list");
    let addr = bucket(BTreeMap::new());
    let run = |flags: &[&str]| {
        let mut job = embed(
            std::slice::from_ref(&list),
            Path::new("s3://b/out"),
            &worker,
        );
        let job = at_bucket(&mut job, addr);
        done(job.args(["--url-patience", "100ms"]).args(flags))
    };
    // Nothing has begun there.
    let mut finish = crate::process::program();
    finish.args(["embed", "--finish", "--output", "s3://b/out"]);
    let ended = at_bucket(&mut finish, addr).output().expect("a run");
    assert_eq!(ended.status.code(), Some(REFUSED), "{}", said(&ended));
    let summary = run(&[]);
    assert_eq!(
        (&summary["rows"], &summary["errors"]),
        (&3.into(), &1.into())
    );
    is_busy.store(false, Ordering::SeqCst);
    let summary = run(&["--retry-errors"]);
    assert_eq!(
        (&summary["rows"], &summary["errors"]),
        (&4.into(), &0.into())
    );
    assert_eq!(summary["finished"], true);
}
