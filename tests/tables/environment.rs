//! Flags that the environment gives, and the report of a job.

use crate::{command, done, embed, image, process, refused, worker};

#[test]
fn a_variable_of_a_flag_without_a_value_is_yes_or_no() {
    let dir = tempfile::tempdir().expect("a folder");
    let worker = worker();
    std::fs::write(dir.path().join("a.png"), image(1)).expect("a file");
    let input = dir.path().join("a.txt");
    std::fs::write(&input, "a.png").expect("a list");
    let normalized = |value: &str| {
        let output = tempfile::tempdir().expect("a folder");
        let mut command = embed(&[&input], output.path(), &worker);
        done(command.env("IMAGEGPT_NORMALIZE", value));
        let manifest = output.path().join("_imagegpt/manifest.json");
        let manifest = std::fs::read_to_string(manifest).expect("a manifest");
        let manifest: serde_json::Value = serde_json::from_str(&manifest).expect("JSON");
        manifest["options"]["--normalize"] == "true"
    };
    for yes in ["1", "yes", "on", "TRUE"] {
        assert!(normalized(yes), "{yes}");
    }
    for no in ["0", "no", "Off", "false", ""] {
        assert!(!normalized(no), "{no}");
    }
    let output = dir.path().join("o");
    let mut command = embed(&[&input], &output, &worker);
    let words = ["maybe", "--normalize"];
    refused(command.env("IMAGEGPT_NORMALIZE", "maybe"), &output, &words);
}

#[test]
fn an_empty_variable_is_none_and_a_flag_beats_one() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    std::fs::create_dir(at("in")).expect("a folder");
    std::fs::write(at("in/a.png"), image(1)).expect("a file");
    let input = [at("in")];
    let mut first = embed(&input, &at("o-1"), &worker);
    for name in [
        "KEEP",
        "MAX_ERRORS",
        "LAYER",
        "FIT",
        "SHARD",
        "SHARDS",
        "ITEM_TIMEOUT",
        "LOG",
    ] {
        first.env(format!("IMAGEGPT_{name}"), "");
    }
    assert_eq!(done(&mut first)["rows"], 1);
    let mut second = embed(&input, &at("o-2"), &worker);
    second.env("IMAGEGPT_ENDPOINT", "http://127.0.0.1:1");
    assert_eq!(done(&mut second)["rows"], 1);
    let mut third = embed(&input, &at("o-3"), &worker);
    third.env("IMAGEGPT_SHARD", "1/7").args(["--shards", "1"]);
    assert_eq!(done(third.env("JOB_COMPLETION_INDEX", "0"))["rows"], 1);
    // The address alone, from the environment and as a flag.
    let address = worker.grpc.to_string();
    let mut bare = command(&input, &at("o-4"));
    assert_eq!(done(bare.env("IMAGEGPT_ENDPOINT", &address))["rows"], 1);
    let mut bare = command(&input, &at("o-5"));
    assert_eq!(done(bare.args(["--endpoint", &address]))["rows"], 1);
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/untrained");
    let mut own = command(&input, &at("o-6"));
    own.env("IMAGEGPT_ENDPOINT", "http://127.0.0.1:1");
    own.args(["--model", model, "--serve", "--fake-engine 0s"]);
    assert_eq!(done(&mut own)["rows"], 1);
    let tokens = process::program()
        .args(["tokenize", "--endpoint", &address])
        .arg(at("in/a.png"))
        .output()
        .expect("a run");
    assert!(tokens.status.success(), "{}", process::said(&tokens));
}

#[test]
fn the_report_counts_rows_and_finish_prints_the_same() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let worker = worker();
    std::fs::write(at("l.txt"), "a.png\nnone.png\n").expect("a list");
    std::fs::write(at("a.png"), image(1)).expect("a file");
    let job = done(&mut embed(&[at("l.txt")], &at("o"), &worker));
    assert_eq!(
        (&job["images"], &job["rows"], &job["errors"]),
        (&2.into(), &1.into(), &1.into())
    );
    let mut finish = process::program();
    finish.args(["embed", "--finish", "--output"]).arg(at("o"));
    finish.env("IMAGEGPT_SHARD", "0/3");
    let finish = done(&mut finish);
    let keys = |report: &serde_json::Value| -> Vec<String> {
        report
            .as_object()
            .expect("an object")
            .keys()
            .cloned()
            .collect()
    };
    assert_eq!(keys(&finish), keys(&job));
    for key in [
        "images", "rows", "errors", "parts", "sha256", "finished", "model", "output",
    ] {
        assert_eq!(finish[key], job[key], "{key}");
    }
    // A job whose images all failed says so.
    std::fs::write(at("bad.txt"), "none.png\n").expect("a list");
    let ended = embed(&[at("bad.txt")], &at("o-bad"), &worker)
        .output()
        .expect("a run");
    assert!(ended.status.success(), "{}", process::said(&ended));
    let said = process::said(&ended);
    assert!(
        said.contains("no image has a row: all 1 are errors"),
        "{said}"
    );
}
