//! `imagegpt probe` with real processes: from labelled pictures to a head that a
//! worker serves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::process::{self, said};
use crate::{REFUSED, TOO_MANY_ERRORS, files};

const MODEL: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/data/models/micro-checkpoint"
);
const CLASSES: [&str; 3] = ["blue", "green", "red"];

/// Makes a picture that is mostly of the color of its class.
fn picture(class: usize, n: usize) -> Vec<u8> {
    let mut state = u32::try_from(class * 1000 + n)
        .expect("few")
        .wrapping_mul(2_654_435_761);
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3] / 2
    };
    let picture = image::RgbImage::from_fn(8, 8, |_, _| {
        let mut color = [noise(), noise(), noise()];
        color[2 - class] += 110;
        image::Rgb(color)
    });
    let mut file = std::io::Cursor::new(Vec::new());
    let written = picture.write_to(&mut file, image::ImageFormat::Png);
    written.expect("a PNG");
    file.into_inner()
}

/// Writes pictures into directories of parts and classes.
fn folders(dir: &Path, parts: &[(&str, usize)]) -> PathBuf {
    let root = dir.join("pictures");
    let mut n = 0;
    for (part, n_pictures) in parts {
        for (class, name) in CLASSES.iter().enumerate() {
            let folder = root.join(part).join(name);
            std::fs::create_dir_all(&folder).expect("a folder");
            for _ in 0..*n_pictures {
                std::fs::write(folder.join(format!("{n:04}.png")), picture(class, n))
                    .expect("a file");
                n += 1;
            }
        }
    }
    root
}

fn imagegpt(dir: &Path) -> Command {
    let mut command = process::program();
    command
        .env("IMAGEGPT_CACHE_DIR", dir.join("cache"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Makes the command `imagegpt probe fit`, by a model in the process whose layers
/// are all served.
fn fit(dir: &Path, input: &Path, head: &str) -> Command {
    let mut command = imagegpt(dir);
    command
        .args(["probe", "fit"])
        .arg(input)
        .arg("--output")
        .arg(dir.join(head))
        .args(["--model", MODEL, "--serve", "--feature-layer 2"]);
    command
}

fn eval(dir: &Path, head: &str, input: &Path) -> Command {
    let mut command = imagegpt(dir);
    command
        .args(["probe", "eval"])
        .arg(dir.join(head))
        .arg(input)
        .args(["--model", MODEL, "--serve", "--feature-layer 2"]);
    command
}

fn done(command: &mut Command) -> String {
    let output = command.output().expect("a run");
    assert!(output.status.success(), "{}", said(&output));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn refused(command: &mut Command, words: &str) {
    let ended = command.output().expect("a run");
    assert_eq!(ended.status.code(), Some(REFUSED), "{}", said(&ended));
    assert!(said(&ended).contains(words), "{words}: {}", said(&ended));
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON")
}

#[test]
fn pictures_in_directories_become_a_head_that_is_served() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let input = folders(dir.path(), &[("train", 20), ("val", 6), ("test", 8)]);
    let flags = [
        "--context",
        "raw,sos-shifted",
        "--norm",
        "pre-attn-rms,none",
    ];
    let table = done(fit(dir.path(), &input, "colors.safetensors").args(flags));
    for words in [
        "60 training, 18 validation and 24 test images",
        "layer 2, raw, none",
        "pixels",
    ] {
        assert!(table.contains(words), "{table}");
    }
    let report = json(&at("colors.json"));
    assert_eq!(report["layers"].as_array().expect("an array").len(), 3 * 4);
    assert_eq!(report["classes"], serde_json::json!(CLASSES));
    assert!(
        report["chosen"]["test_accuracy"]
            .as_f64()
            .expect("a number")
            > 0.8,
        "{table}"
    );
    assert_eq!(report["guesses"]["chance_accuracy"], 1.0 / 3.0);
    for plot in ["colors-layers.svg", "colors-confusion.svg"] {
        let text = std::fs::read_to_string(at(plot)).expect("a file");
        assert!(
            text.starts_with("<svg") && text.contains("</svg>"),
            "{plot}"
        );
    }

    // `probe eval` finds the same figures on the test part, through new tables.
    let (found, lines, sheet) = (at("eval.json"), at("predictions.jsonl"), at("sheet.png"));
    done(
        eval(dir.path(), "colors.safetensors", &input)
            .args(["--part", "test", "--json"])
            .arg(&found)
            .arg("--predictions")
            .arg(&lines)
            .arg("--sheet")
            .arg(&sheet),
    );
    let measures = &json(&found)["measures"];
    assert_eq!(measures["examples"], 24);
    let (now, then) = (&measures["log_loss"], &report["test"]["log_loss"]);
    let (now, then) = (
        now.as_f64().expect("a number"),
        then.as_f64().expect("a number"),
    );
    assert!((now - then).abs() < 1e-5, "{now} {then}");
    assert_eq!(measures["accuracy"], report["test"]["accuracy"]);
    let n_wrong = measures["wrong"].as_array().map_or(0, Vec::len);
    assert_eq!(sheet.exists(), n_wrong > 0);

    // A worker that serves the head gives the same scores.
    let lines = std::fs::read_to_string(&lines).expect("a file");
    let expected: BTreeMap<String, Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .map(|line: Value| (line["id"].as_str().expect("text").to_owned(), line))
        .collect();
    assert_eq!(expected.len(), 24);
    let head = format!("colors={}", at("colors.safetensors").display());
    let classified = done(
        imagegpt(dir.path())
            .args(["classify", "--json", "--top-k", "3", "--model", MODEL])
            .args(["--serve", &format!("--feature-layer 2 --head {head}")])
            .args(["--head", "colors"])
            .arg(input.join("test")),
    );
    let mut n_lines = 0;
    for line in classified.lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let file = line["file"].as_str().expect("a file");
        let (_, id) = file.split_once("pictures/").expect("a path");
        let scores = expected[id]["scores"].as_array().expect("an array");
        let classes = line["classes"].as_array().expect("an array");
        assert_eq!(classes.len(), 3);
        for class in classes {
            let label = class["label"].as_str().expect("text");
            let place = CLASSES
                .iter()
                .position(|known| *known == label)
                .expect("a class");
            let got = class["score"].as_f64().expect("a number");
            let wanted = scores[place].as_f64().expect("a number");
            assert!((got - wanted).abs() < 1e-5, "{id} {label}: {got} {wanted}");
        }
        n_lines += 1;
    }
    assert_eq!(n_lines, 24);

    // The same command again finds its tables, and writes the same head.
    let before = std::fs::read(at("colors.safetensors")).expect("a file");
    done(fit(dir.path(), &input, "colors.safetensors").args(flags));
    assert!(std::fs::read(at("colors.safetensors")).expect("a file") == before);
}

#[test]
fn a_job_does_not_go_on_with_another_head_of_the_same_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let input = folders(dir.path(), &[("", 8)]);
    for (head, layer) in [("colors.safetensors", "2"), ("other.safetensors", "0")] {
        let mut fit = fit(dir.path(), &input, head);
        done(fit.args(["--layers", layer, "--baselines", "false"]));
    }
    let job = |head: &Path| {
        let mut job = imagegpt(dir.path());
        job.args([
            "embed", "--task", "classify", "--head", "colors", "--model", MODEL,
        ])
        .args([
            "--serve",
            &format!("--feature-layer 2 --head colors={}", head.display()),
        ])
        .arg(&input)
        .arg("--output")
        .arg(at("classes"));
        job
    };
    done(&mut job(&at("colors.safetensors")));
    refused(
        &mut job(&at("other.safetensors")),
        "the head's digest was sha256:",
    );
    done(&mut job(&at("colors.safetensors")));
}

#[test]
fn tables_of_a_job_give_the_same_head_as_the_pictures() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let input = folders(dir.path(), &[("", 16)]);
    let flags = [
        "--validation-share",
        "0.25",
        "--seed",
        "3",
        "--baselines",
        "false",
    ];
    done(fit(dir.path(), &input, "a.safetensors").args(flags));
    let head = std::fs::read(at("a.safetensors")).expect("a file");
    for (name, format) in [("b", "parquet"), ("c", "arrow")] {
        let table = at(&format!("table-{name}"));
        let mut job = imagegpt(dir.path());
        job.args(["embed", "--layers", "all", "--part-items", "10"])
            .arg(&input)
            .args([
                "--format",
                format,
                "--model",
                MODEL,
                "--serve",
                "--feature-layer 2",
            ])
            .arg("--output")
            .arg(&table);
        done(&mut job);
        let fitted = at(&format!("{name}.safetensors"));
        let mut fit = imagegpt(dir.path());
        fit.args(["probe", "fit"])
            .arg(&table)
            .args(flags)
            .arg("--output")
            .arg(&fitted);
        let table = done(&mut fit);
        assert!(!table.contains("pixels"), "{table}");
        assert!(std::fs::read(&fitted).expect("a file") == head, "{name}");
    }
    // A table can be measured, too, but not drawn.
    let measured = |flags: &[&str]| {
        let mut eval = imagegpt(dir.path());
        eval.args(["probe", "eval"])
            .args([at("a.safetensors"), at("table-b")])
            .args(flags);
        eval
    };
    assert!(done(&mut measured(&[])).contains("48 images: accuracy"));
    refused(
        measured(&["--sheet", "s.png"]).current_dir(dir.path()),
        "has no pictures",
    );
    // A table that has lost a part is not fitted.
    std::fs::remove_file(at("table-b/part-00001-00000.parquet")).expect("a part");
    refused(&mut measured(&[]), "has 38 rows, and its job has made 48");
    // Without files of its own beside the head.
    let names: Vec<String> = files(dir.path())
        .into_keys()
        .filter(|name| name.contains("scratch"))
        .collect();
    assert!(names.is_empty(), "{names:?}");
}

#[test]
fn labels_are_in_columns_and_may_be_several() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    folders(dir.path(), &[("", 20)]);
    let mut lines = String::from("path,tags,part,shoot\n");
    for n in 0..60 {
        let class = CLASSES[n / 20];
        let warm = if class == "red" { "warm, red" } else { "cold" };
        let part = if n % 4 == 0 { "test" } else { "train" };
        let shoot = format!("{part} {}", n / 3);
        let line = [format!(
            "pictures/{class}/{n:04}.png,\"{warm}\",{part},{shoot}\n"
        )];
        lines.push_str(&line.concat());
    }
    std::fs::write(at("list.csv"), lines).expect("a list");
    let columns = ["--label", "tags", "--split", "part", "--group", "shoot"];
    let table = done(
        fit(dir.path(), &at("list.csv"), "tags.safetensors")
            .args(columns)
            .arg("--multi-label"),
    );
    assert!(table.contains("3 classes"), "{table}");
    let report = json(&at("tags.json"));
    assert_eq!(
        report["classes"],
        serde_json::json!(["cold", "red", "warm"])
    );
    assert_eq!(report["examples"]["test"], 15);
    assert_eq!(report["multi_label"], true);
    let accuracy = report["test"]["mean_average_precision"].as_f64();
    assert!(accuracy.expect("a number") > 0.8, "{table}");
    refused(
        fit(dir.path(), &at("list.csv"), "x.safetensors")
            .args(["--label", "tags", "--split", "tags"]),
        "has the part",
    );
    refused(
        eval(dir.path(), "tags.safetensors", &at("list.csv")).args(["--label", "tags"]),
        "give --multi-label",
    );
    assert!(!at("x.safetensors").exists());
}

#[test]
fn what_cannot_be_fitted_is_refused_in_a_sentence() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let write = |path: &str, class: usize, n: usize| {
        let path = at(path);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(path, picture(class, n)).expect("a file");
    };
    for n in 0..4 {
        write(&format!("one-class/red/{n}.png"), 2, n);
        write(&format!("lonely/red/{n}.png"), 2, n);
        write(&format!("flat/{n}.png"), 2, n);
        write(&format!("good/red/{n}.png"), 2, n);
        write(&format!("good/blue/{n}.png"), 0, n);
    }
    write("lonely/blue/9.png", 0, 9);
    std::fs::create_dir(at("empty")).expect("a folder");
    let fit = |input: &str| fit(dir.path(), &at(input), "x.safetensors");
    refused(&mut fit("empty"), "a directory without images");
    refused(&mut fit("one-class"), "one class");
    refused(&mut fit("lonely"), "blue");
    refused(&mut fit("flat"), "give --label COLUMN");
    refused(fit("good").args(["--label", "color"]), "has no columns");
    refused(fit("good").args(["--layers", "9"]), "--layers 9");
    refused(fit("good").args(["--strengths", "0"]), "a strength must be");
    refused(
        fit("good").args(["--test-share", "0.9"]),
        "leave nothing to train on",
    );
    refused(
        fit("good").args(["--validation-share", "1"]),
        "a share must be",
    );
    refused(
        &mut self::fit(dir.path(), &at("good"), "/nowhere/x.safetensors"),
        "/nowhere/x.safetensors cannot be written",
    );

    let to = |head: &str| self::fit(dir.path(), &at("good"), head);
    refused(&mut to("x.json"), "ends with .safetensors");

    // Test images are not trained on because nobody says where they are.
    for n in 0..4 {
        write(&format!("mixed/train/red/{n}.png"), 2, n);
        write(&format!("mixed/extra/blue/{n}.png"), 0, n);
    }
    refused(&mut fit("mixed"), "and extra/blue/0.png is in none");
    let lines =
        "path,a.b\ngood/red/0.png,x\ngood/red/1.png,x\ngood/blue/0.png,y\ngood/blue/1.png,y\n";
    std::fs::write(at("train.csv"), lines).expect("a list");
    std::fs::write(at("test.csv"), lines.replace('0', "2").replace('1', "3")).expect("a list");
    let mut both = imagegpt(dir.path());
    both.args(["probe", "fit"])
        .args([at("train.csv"), at("test.csv")])
        .args([
            "--label",
            "a.b",
            "--model",
            MODEL,
            "--serve",
            "--feature-layer 2",
            "--output",
        ])
        .arg(at("x.safetensors"));
    refused(
        &mut both,
        "test.csv is called like a validation or test part",
    );
    // Alone it is fitted, by a column whose name has a dot.
    done(
        self::fit(dir.path(), &at("train.csv"), "dotted.safetensors").args([
            "--label",
            "a.b",
            "--validation-share",
            "0.5",
            "--baselines",
            "false",
        ]),
    );
    assert!(!at("x.safetensors").exists() && !at("x.json").exists());
}

#[test]
fn null_labels_and_tables_of_different_models_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    folders(dir.path(), &[("", 4)]);
    std::fs::rename(at("pictures"), at("good")).expect("a folder");
    let fit = |input: &str| fit(dir.path(), &at(input), "x.safetensors");
    // Labels that are null, and tables of different models.
    std::fs::write(
        at("nulls.jsonl"),
        "{\"path\":\"good/red/0008.png\",\"label\":\"a\"}\n{\"path\":\"good/red/0009.png\"}\n",
    )
    .expect("a list");
    refused(
        fit("nulls.jsonl").args(["--label", "label"]),
        "has no value",
    );
    let job = |table: &str, model: &str| {
        let mut job = imagegpt(dir.path());
        job.args([
            "embed",
            "--layers",
            "2",
            "--model",
            model,
            "--serve",
            "--feature-layer 2",
        ])
        .arg(at("good"))
        .arg("--output")
        .arg(at(table));
        done(&mut job);
    };
    let other = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/models/micro-causal"
    );
    job("table-a", MODEL);
    job("table-b", other);
    let mut both = imagegpt(dir.path());
    both.args(["probe", "fit"])
        .args([at("table-a"), at("table-b")])
        .arg("--output")
        .arg(at("x.safetensors"));
    refused(&mut both, "give tables of one model");
    refused(both.args(["--baselines", "true"]), "which have no pixels");
    assert!(!at("x.safetensors").exists() && !at("x.json").exists());
}

#[test]
fn images_that_fail_are_left_out_where_they_are_allowed() {
    let dir = tempfile::tempdir().expect("a folder");
    let input = folders(dir.path(), &[("", 12)]);
    std::fs::write(input.join("red/broken.png"), "no image").expect("a file");
    let fit = |flags: &[&str]| {
        let mut command = fit(dir.path(), &input, "x.safetensors");
        command.args(["--baselines", "false"]).args(flags);
        command
    };
    let ended = fit(&[]).output().expect("a run");
    assert_eq!(
        ended.status.code(),
        Some(TOO_MANY_ERRORS),
        "{}",
        said(&ended)
    );
    // The same job goes on.
    let table = done(&mut fit(&["--max-errors", "1"]));
    assert!(
        table.contains("1 images failed and are left out"),
        "{table}"
    );
    let work = std::fs::read_dir(dir.path().join("x.features")).expect("a folder");
    assert_eq!(work.count(), 1);
    let table = done(&mut fit(&["--max-errors", "1", "--iterations-max", "1"]));
    assert!(table.contains("fits did not converge"), "{table}");
}
