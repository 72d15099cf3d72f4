//! Two processes for one output, and a disk that is full.

use std::path::Path;
use std::process::{Command, Output};

use crate::process::{said, until};
use crate::{FAILED, done, embed, files, process, rows, start, tree};

/// Lists what a job keeps of its leases.
fn leases(output: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(output.join("_imagegpt/leases")) else {
        return Vec::new();
    };
    let names = entries.map(|entry| entry.expect("an entry").file_name());
    names
        .map(|name| name.into_string().expect("UTF-8"))
        .collect()
}

#[test]
fn a_second_process_for_a_share_is_told_so_at_once() {
    let dir = tempfile::tempdir().expect("a folder");
    let input = tree(dir.path(), 400);
    let workers = [start("5ms")];
    let whole = dir.path().join("whole");
    done(&mut embed(&input, &whole, &workers));
    assert!(leases(&whole).is_empty());

    let output = dir.path().join("output");
    let mut first = embed(&input, &output, &workers).spawn().expect("a process");
    until("the first has its lease", || !leases(&output).is_empty());
    // A share of another number of shares has files in common with it, too.
    for share in ["0/1", "1/2"] {
        let mut second = embed(&input, &output, &workers);
        let ended = second.args(["--shard", share]).output().expect("a run");
        assert_eq!(ended.status.code(), Some(FAILED), "{}", said(&ended));
        let words = format!("is being worked on by process {} on", first.id());
        assert!(said(&ended).contains(&words), "{}", said(&ended));
    }
    // Killed, it leaves its lease, which the next process takes over at once.
    process::signal(&first, "-KILL");
    first.wait().expect("an end");
    assert_eq!(leases(&output), ["00000-of-00001.json"]);
    done(&mut embed(&input, &output, &workers));
    assert!(leases(&output).is_empty());
    assert_eq!(rows(&output), rows(&whole));
    assert_eq!(files(&output), files(&whole));
}

/// Runs a job whose files may have `bytes` bytes: the system ends a write in the
/// middle, as it does on a full disk.
fn limited(command: &Command, bytes: usize) -> Output {
    let limit = format!("trap '' XFSZ; exec prlimit --fsize={bytes} \"$0\" \"$@\"");
    Command::new("sh")
        .args(["-c", &limit])
        .arg(command.get_program())
        .args(command.get_args())
        .output()
        .expect("a run")
}

/// Returns the dotfiles below a directory.
fn hidden(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let entry = entry.expect("an entry");
        let name = entry.file_name().into_string().expect("UTF-8");
        if entry.path().is_dir() {
            found.extend(hidden(&entry.path()));
        } else if name.starts_with('.') {
            found.push(name);
        }
    }
    found
}

#[test]
fn a_full_disk_leaves_nothing_half_written_and_the_job_goes_on() {
    let dir = tempfile::tempdir().expect("a folder");
    let input = tree(dir.path(), 250);
    let workers = [start("0s")];
    let whole = dir.path().join("whole");
    done(&mut embed(&input, &whole, &workers));
    let output = dir.path().join("output");
    // No room for a probe; none for the manifest; none for a part.
    for bytes in [2, 300, 3000] {
        let ended = limited(&embed(&input, &output, &workers), bytes);
        assert_eq!(
            ended.status.code(),
            Some(FAILED),
            "{bytes}: {}",
            said(&ended)
        );
        let words = "cannot be written";
        assert!(said(&ended).contains(words), "{bytes}: {}", said(&ended));
        assert!(hidden(dir.path()).is_empty(), "{bytes}");
        assert!(leases(&output).is_empty(), "{bytes}");
    }
    assert!(output.join("_imagegpt/manifest.json").exists());
    assert!(!output.join("part-00000-00000.parquet").exists());
    done(&mut embed(&input, &output, &workers));
    assert_eq!(files(&output), files(&whole));
}
