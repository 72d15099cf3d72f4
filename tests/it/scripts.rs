//! Scripts refuse settings that they cannot use, before any work.

use std::path::Path;
use std::process::{Command, Output};

fn in_scripts(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("scripts")
        .join(path)
}

/// Runs `scripts/bench-gpu.sh` with one setting and the program of this build.
fn bench_gpu(out: &Path, setting: (&str, &str)) -> Output {
    Command::new(in_scripts("bench-gpu.sh"))
        .env("IMAGEGPT", crate::process::PROGRAM)
        .env("PROVIDER", "cpu")
        .env("OUT", out)
        .env(setting.0, setting.1)
        .output()
        .expect("bash")
}

/// Runs a program in Python that has a test of itself and needs no package.
fn own_test(path: &str) {
    let output = Command::new("python3")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(path))
        .arg("test")
        .output()
        .expect("Python 3");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{path}: {said}");
}

#[test]
fn settings_of_bench_gpu_are_read_as_its_own_test_says() {
    own_test("scripts/bench-gpu/settings.py");
}

#[test]
fn times_of_kernels_are_read_as_their_own_test_says() {
    own_test("scripts/bench-gpu/kernels.py");
}

#[test]
fn a_training_ends_and_is_kept_as_its_own_test_says() {
    own_test("models/train/decisions.py");
}

#[test]
fn a_wrong_setting_of_bench_gpu_is_one_line_and_exit_code_2() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out");
    for (name, value) in [
        ("STEPS", "nope"),
        ("BUDGET", "x"),
        ("PROVIDER", "tpu"),
        ("SHAPES", "nope"),
    ] {
        let output = bench_gpu(&out, (name, value));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains(name) && said.contains(value), "{said}");
        assert!(output.stdout.is_empty() && !out.exists());
    }
}

/// Runs `scripts/advisories.sh` with a program in the place of cargo-deny, which
/// prints its arguments and ends with the exit code 7.
fn advisories(folder: &Path, database: &Path) -> Output {
    use std::os::unix::fs::PermissionsExt as _;
    let program = folder.join("cargo-deny");
    std::fs::write(&program, "#!/bin/sh\necho \"$@\"\nexit 7\n").expect("written");
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&program, executable).expect("executable");
    Command::new(in_scripts("advisories.sh"))
        .env("ADVISORIES", database)
        .env("CARGO_DENY", program)
        .output()
        .expect("bash")
}

#[test]
fn advisories_are_checked_where_their_database_is_and_said_not_to_be_elsewhere() {
    let folder = tempfile::tempdir().expect("a folder");
    let nowhere = folder.path().join("nowhere");
    let output = advisories(folder.path(), &nowhere);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("advisories are NOT checked"), "{said}");
    assert!(said.contains("nowhere cannot be reached"), "{said}");
    assert!(output.stdout.is_empty());

    let there = folder.path().join("there");
    let made = Command::new("git")
        .arg("init")
        .arg("--quiet")
        .arg(&there)
        .status();
    assert!(made.expect("git").success());
    let output = advisories(folder.path(), &there);
    assert_eq!(output.status.code(), Some(7));
    let ran = String::from_utf8_lossy(&output.stdout);
    assert_eq!(ran.trim(), "--locked check advisories");
}
