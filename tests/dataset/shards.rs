//! Tars and directories as strangers leave them: every image is a row, or an
//! error under its own name.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{REFUSED, Worker, done, embed, error_lines, image, rows, said, start, tars};

/// Tars of other programs, a fault of earlier versions each.
const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tars");

/// Embeds an input, and checks the ids of the rows and of the errors.
#[track_caller]
fn check(
    worker: &[Worker],
    input: &Path,
    flags: &[&str],
    ids: &[&str],
    errors: &[(&str, &str)],
) -> Value {
    let output = tempfile::tempdir().expect("a folder");
    let output = output.path().join("o");
    let summary = done(embed(input, &output, worker).args(flags));
    let found: BTreeSet<String> = rows(&output).into_keys().collect();
    let expected: BTreeSet<String> = ids.iter().map(|id| (*id).to_owned()).collect();
    assert_eq!(found, expected, "{}", input.display());
    let found = error_lines(&output);
    let found: Vec<(&str, &str)> = found.iter().map(|(id, code)| (&**id, &**code)).collect();
    assert_eq!(found, errors, "{}", input.display());
    summary
}

#[test]
fn every_image_of_a_tar_is_a_row() {
    let worker = [start("0s")];
    let dotted = ["IMG_2023", "IMG_2023.02.jpg", "IMG_2023.03.jpg", "x"];
    for (name, ids) in [
        ("dotted_names", &dotted[..]),
        ("dup_names", &["a", "a.jpg", "b"]),
        ("links", &["a", "b", "c", "d"]),
        ("sparse_gnu", &["a", "b", "c"]),
        ("latin1", &["caf%E8", "caf%E9"]),
    ] {
        let input = PathBuf::from(format!("{CASES}/{name}.tar"));
        check(&worker, &input, &[], ids, &[]);
    }
    let dir = tempfile::tempdir().expect("a folder");
    let empty = dir.path().join("empty.tar");
    std::fs::write(&empty, b"").expect("a file");
    let name = empty.to_str().expect("UTF-8");
    check(&worker, &empty, &[], &[], &[(name, "DATA_LOSS")]);
}

#[test]
fn a_compressed_tar_is_known_by_its_content() {
    use std::io::Write as _;

    let worker = [start("0s")];
    let dir = tempfile::tempdir().expect("a folder");
    let plain = tars(dir.path(), 20, 20).join("000.tar");
    let plain = std::fs::read(plain).expect("a file");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).expect("memory");
    let gzip = gzip.finish().expect("memory");
    let ids: Vec<String> = (0..20).map(super::id).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    for (name, content) in [
        ("a.tar.gz", &gzip),
        ("b.tgz", &gzip),
        ("c.tar", &gzip),
        ("d", &gzip),
        ("e.data", &plain),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, content).expect("a file");
        check(&worker, &path, &["--keep", "cls"], &ids, &[]);
    }
    let shards = dir.path().join("shards");
    std::fs::create_dir(&shards).expect("a folder");
    std::fs::write(shards.join("0.tar.gz"), &gzip).expect("a file");
    std::fs::write(shards.join("LICENSE"), b"text").expect("a file");
    std::fs::write(shards.join("1.tar.zst"), b"zstd").expect("a file");
    let summary = check(&worker, &shards, &[], &ids, &[]);
    assert_eq!(summary["unread"]["tar.zst"], 1);
    std::fs::remove_file(shards.join("0.tar.gz")).expect("a file");
    std::fs::write(shards.join("blob"), &gzip).expect("a file");
    check(&worker, &shards, &[], &ids, &[]);
}

#[test]
fn what_is_no_data_of_a_directory_is_counted() {
    let worker = [start("0s")];
    let dir = tempfile::tempdir().expect("a folder");
    let write = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        std::fs::write(path, content).expect("a file");
    };
    write("p/DCIM/_DSC0001.PNG", &image(1));
    write("p/a.jfif", &image(2));
    write("p/b.pjpeg", &image(3));
    write("p/c.HEIC", b"heic");
    write("p/d.avif", b"avif");
    write("p/e/f.jxl", b"jxl");
    write("p/_thumbs/g.png", &image(4));
    write("p/.cache/h.png", &image(5));
    write("p/._a.jfif", b"AppleDouble");
    let ids = ["DCIM/_DSC0001.PNG", "a.jfif", "b.pjpeg"];
    let summary = check(&worker, &dir.path().join("p"), &[], &ids, &[]);
    assert_eq!(summary["passed_over"], 3);
    let unread = serde_json::json!({"avif": 1, "heic": 1, "jxl": 1});
    assert_eq!(summary["unread"], unread);

    // A directory of img2dataset, with a job of Spark in it.
    let tar = std::fs::read(tars(dir.path(), 3, 3).join("000.tar")).expect("a file");
    write("i/00000.tar", &tar);
    write("i/00000.parquet", b"metadata");
    write("i/00000_stats.json", b"{}");
    write("i/_temporary/0/00001.tar", b"unfinished");
    write("i/_00002.tar", b"unfinished");
    let ids = ["00000", "00001", "00002"];
    let summary = check(&worker, &dir.path().join("i"), &[], &ids, &[]);
    assert_eq!(summary["passed_over"], 3);
    // Without its mark the kind must be named.
    std::fs::remove_file(dir.path().join("i/00000_stats.json")).expect("a file");
    let output = dir.path().join("o");
    let ended = embed(&dir.path().join("i"), &output, &worker)
        .output()
        .expect("a run");
    assert_eq!(ended.status.code(), Some(REFUSED));
    assert!(
        said(&ended).contains("(tar, parquet); choose one with --kind"),
        "{}",
        said(&ended)
    );
    check(
        &worker,
        &dir.path().join("i"),
        &["--kind", "tar"],
        &ids,
        &[],
    );
    // Pictures that cannot be read are named where there is nothing else.
    write("h/a.heic", b"heic");
    let ended = embed(&dir.path().join("h"), &output, &worker)
        .output()
        .expect("a run");
    assert_eq!(ended.status.code(), Some(REFUSED));
    assert!(said(&ended).contains("1 .heic"), "{}", said(&ended));
}
