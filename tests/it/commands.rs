//! `imagegpt generate`, `score`, `classify`, `tokenize` and `neighbors`, against
//! workers with the fake engine and with a compiled model, and as processes of
//! their own.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use clap::Parser;
use imagegpt::commands::{self, CommandOutcome, ImageCommand};
use imagegpt::engine::fake::Script;
use imagegpt::imaging::render;
use imagegpt::model::precision::Precision;
use imagegpt::proto::pb;
use serde_json::Value;
use tempfile::TempDir;

use crate::generate::{causal, fake, likeliest, transformers};
use crate::harness::{self, Running, seeded};
use crate::process;

const PICTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/pictures");

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    ask: ImageCommand,
}

/// Exit status and output of a command.
struct Said {
    outcome: CommandOutcome,
    text: String,
}

impl Said {
    fn json(&self) -> Vec<Value> {
        let lines = self.text.lines();
        lines
            .map(|line| serde_json::from_str(line).expect("a JSON object"))
            .collect()
    }
}

/// Runs a command against a worker.
async fn run(running: &Running, arguments: &[&str]) -> anyhow::Result<Said> {
    run_until(running, arguments, std::future::pending()).await
}

async fn run_until(
    running: &Running,
    arguments: &[&str],
    stop: impl Future<Output = ()>,
) -> anyhow::Result<Said> {
    let endpoint = running.url();
    let all = [&["imagegpt"], arguments, &["--endpoint", &endpoint]].concat();
    let cli = Cli::try_parse_from(all).expect("arguments that parse");
    let mut out = Vec::new();
    let outcome = commands::run(&cli.ask, stop, &mut out).await?;
    let text = String::from_utf8(out).expect("text");
    Ok(Said { outcome, text })
}

async fn palette(running: &Running) -> bytes::Bytes {
    let mut client = running.client.clone();
    let model = client.get_model(pb::GetModelRequest {}).await;
    model.expect("a model").into_inner().palette_rgb8
}

/// Directory of pictures whose tokens are known.
struct Pictures(TempDir);

impl Pictures {
    /// Writes pictures with these tokens in the palette of the worker's model.
    async fn new(running: &Running, images: &[Vec<u32>]) -> Self {
        let palette = palette(running).await;
        let folder = tempfile::tempdir().expect("a folder");
        for (idx, ids) in images.iter().enumerate() {
            let ids: Vec<u16> = ids
                .iter()
                .map(|&id| id.try_into().expect("16 bits"))
                .collect();
            let png = render::png(&ids, &palette, 8, 1, png::Compression::Fast).expect("a PNG");
            std::fs::write(folder.path().join(format!("{idx:02}.png")), png).expect("written");
        }
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("UTF-8").to_owned()
    }

    fn folder(&self) -> &str {
        self.0.path().to_str().expect("UTF-8")
    }
}

fn size(path: &Path) -> (u32, u32) {
    let bytes = std::fs::read(path).expect("a file");
    let picture = image::load_from_memory(&bytes).expect("a PNG");
    (picture.width(), picture.height())
}

#[tokio::test]
async fn tokens_of_many_files_come_in_order_and_bad_files_beside_them() {
    let running = harness::fake(Script::default(), &["--max-batch-size", "4"]).await;
    let images: Vec<Vec<u32>> = (0..20).map(seeded).collect();
    let pictures = Pictures::new(&running, &images).await;
    let previews = pictures.text("previews/deep");
    let arguments = [
        "tokenize",
        pictures.folder(),
        "--json",
        "--preview",
        &previews,
        "--scale",
        "3",
    ];
    let said = run(&running, &arguments).await.expect("a run");
    assert_eq!(said.outcome, CommandOutcome::Done);
    let lines = said.json();
    assert_eq!(lines.len(), images.len());
    for (idx, (line, ids)) in lines.iter().zip(&images).enumerate() {
        assert_eq!(line["file"], pictures.text(&format!("{idx:02}.png")));
        assert_eq!(line["ids"], serde_json::json!(ids));
    }
    assert_eq!(size(&pictures.path("previews/deep/07.png")), (24, 24));

    std::fs::remove_dir_all(pictures.path("previews")).expect("removed");
    std::fs::write(pictures.path("05.png"), b"no picture").expect("written");
    let missing = pictures.text("missing.png");
    let said = run(&running, &["tokenize", &missing, pictures.folder()]).await;
    let said = said.expect("a run");
    assert_eq!(said.outcome, CommandOutcome::Failed);
    let lines: Vec<&str> = said.text.lines().collect();
    assert_eq!(lines.len(), 19);
    let ids: Vec<String> = images[6].iter().map(u32::to_string).collect();
    assert_eq!(
        lines[5],
        format!("{}\t{}", pictures.text("06.png"), ids.join(" "))
    );
    running.end().await;
}

#[tokio::test]
async fn a_full_worker_is_asked_again() {
    let script = Script {
        delay: Duration::from_millis(5),
        ..Default::default()
    };
    let flags = [
        "--images-in-flight-max",
        "2",
        "--images-per-call-max",
        "2",
        "--max-batch-size",
        "1",
        "--generate-slots",
        "0",
    ];
    let running = harness::fake(script, &flags).await;
    let images: Vec<Vec<u32>> = (0..24).map(seeded).collect();
    let pictures = Pictures::new(&running, &images).await;
    let arguments = ["classify", pictures.folder(), "--json", "--top-k", "1"];
    let said = run(&running, &arguments).await.expect("a run");
    assert_eq!(
        (said.outcome, said.json().len()),
        (CommandOutcome::Done, 24)
    );
    let refused = "imagegpt_requests_total{method=\"Classify\",code=\"RESOURCE_EXHAUSTED\"}";
    assert!(
        running.sample(refused).await > 0.0,
        "four calls where two have room"
    );
    running.end().await;
}

#[tokio::test]
async fn classes_stand_in_columns_and_without_names_logits_do() {
    let running = harness::fake(Script::default(), &[]).await;
    let pictures = Pictures::new(&running, &[seeded(1), seeded(2)]).await;
    let said = run(&running, &["classify", pictures.folder()]).await;
    let text = said.expect("a run").text;
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("model micro (sha256:"), "{text}");
    assert!(lines[1].starts_with("notice: untrained"), "{text}");
    let file = lines[2].find("file").expect("a header");
    for (line, name) in lines[3..].iter().zip(["00.png", "01.png"]) {
        assert_eq!(&line[file..], pictures.text(name), "{text}");
        assert!(line.contains("circle") && line.contains("square"), "{text}");
    }
    let said = run(&running, &["classify", pictures.folder(), "--json"]).await;
    let line = &said.expect("a run").json()[0];
    assert_eq!(line["classes"].as_array().map(Vec::len), Some(3));
    let scores = |idx: usize| line["classes"][idx]["score"].as_f64().expect("a score");
    assert!((scores(0) + scores(1) + scores(2) - 1.0).abs() < 1e-5);
    let error = run(&running, &["classify", pictures.folder(), "--head", "pets"]).await;
    let error = error.err().expect("an error").to_string();
    assert!(error.contains("NOT_FOUND"), "{error}");
    let error = run(&running, &["classify", pictures.folder(), "--head", "a=b"]).await;
    assert!(
        error
            .err()
            .expect("an error")
            .to_string()
            .contains("--model")
    );
    running.end().await;

    let running = harness::onnx("no-labels", &[]).await;
    let said = run(&running, &["classify", pictures.folder(), "--json"]).await;
    let line = &said.expect("a run").json()[0];
    assert_eq!(line["classes"], serde_json::json!([]));
    let n_logits = line["logits"].as_array().map(Vec::len).expect("logits");
    assert!(n_logits > 0);
    running.end().await;
}

#[tokio::test]
async fn scores_are_sorted_mapped_and_those_of_transformers() {
    let folder = tempfile::tempdir().expect("a folder");
    let running = causal(folder.path(), Precision::Fp32, &[]).await;
    let expected = transformers().images;
    let mut images: Vec<Vec<u32>> = expected.iter().map(|image| image.tokens.clone()).collect();
    images.push(vec![3; 64]);
    let pictures = Pictures::new(&running, &images).await;
    let maps = pictures.text("maps");
    let arguments = [
        "score",
        pictures.folder(),
        "--json",
        "--complexity",
        "--map",
        &maps,
    ];
    let said = run(&running, &arguments).await.expect("a run");
    let lines = said.json();
    assert_eq!(lines.len(), images.len());
    for (line, image) in lines.iter().zip(&expected) {
        let nats: f64 = image.nll.iter().sum();
        let got = line["nats"].as_f64().expect("nats");
        assert!((got - nats).abs() <= 1e-4 * nats, "{line} {nats}");
        assert_eq!(
            size(Path::new(line["map"].as_str().expect("a map"))),
            (64, 64)
        );
    }
    let complexity = |idx: usize| lines[idx]["complexity_bits_per_token"].as_f64();
    assert!(complexity(images.len() - 1) < complexity(0), "one color");

    std::fs::remove_dir_all(&maps).expect("removed");
    let said = run(&running, &["score", pictures.folder(), "--sort"]).await;
    let text = said.expect("a run").text;
    let rows = text
        .lines()
        .skip_while(|line| !line.starts_with("nats/token"))
        .skip(1);
    let rows: Vec<f64> = rows
        .map(|row| row.split_whitespace().next().expect("a number"))
        .map(|number| number.parse().expect("a number"))
        .collect();
    assert_eq!(rows.len(), images.len());
    assert!(rows.is_sorted_by(|a, b| a >= b), "{text}");

    // The same of a model that the command serves to itself, as a process.
    let model = folder.path().join(Precision::Fp32.name());
    let model = model.to_str().expect("UTF-8");
    let output = imagegpt(
        &["score", pictures.folder(), "--json", "--model", model],
        b"",
    );
    let text = String::from_utf8(output.stdout).expect("text");
    for (line, before) in text.lines().zip(&lines) {
        let line: Value = serde_json::from_str(line).expect("a JSON object");
        assert_eq!(line["nats"], before["nats"]);
    }
    assert_eq!(text.lines().count(), images.len());
    running.end().await;
}

/// Returns the tokens of a saved sample by the palette's colors.
fn saved(path: &Path, palette: &[u8]) -> Vec<u32> {
    let bytes = std::fs::read(path).expect("a file");
    let picture = image::load_from_memory(&bytes).expect("a PNG").into_rgb8();
    let token = |pixel: &image::Rgb<u8>| {
        let found = palette.chunks_exact(3).position(|color| color == pixel.0);
        u32::try_from(found.expect("a color of the palette")).expect("small")
    };
    picture.pixels().map(token).collect()
}

#[tokio::test]
async fn a_sheet_shows_inputs_what_is_kept_and_samples() {
    let running = fake(4, Duration::ZERO, &[]).await;
    let images = [seeded(1), seeded(2)];
    let pictures = Pictures::new(&running, &images).await;
    let palette = palette(&running).await;
    let (sheet, samples) = (pictures.text("out.sheet"), pictures.text("samples"));
    let inputs = [pictures.text("00.png"), pictures.text("01.png")];
    let arguments = [
        "generate",
        "--input",
        &inputs[0],
        "--input",
        &inputs[1],
        "--samples",
        "3",
        "--temperature",
        "0",
        "--scale",
        "1",
        "--output",
        &sheet,
        "--save-samples",
        &samples,
        "--json",
    ];
    let said = run(&running, &arguments).await.expect("a run");
    let lines = said.json();
    assert_eq!((said.outcome, lines.len()), (CommandOutcome::Done, 6));
    for (idx, line) in lines.iter().enumerate() {
        assert_eq!(line["input"], inputs[idx / 3]);
        assert_eq!(line["sample"], idx % 3);
        assert_eq!(line["pixels_drawn"], 32);
        assert!(line["log_prob_mean"].as_f64().expect("a number") < 0.0);
        let file = Path::new(line["file"].as_str().expect("a file"));
        assert_eq!(saved(file, &palette), likeliest(&images[idx / 3][..32]));
    }
    // Image, its half and three samples, with gaps of two pixels.
    assert_eq!(size(Path::new(&sheet)), (5 * 10 + 2, 2 * 10 + 2));
    let bytes = std::fs::read(&sheet).expect("a sheet");
    let drawn = image::load_from_memory(&bytes).expect("a PNG").into_rgb8();
    let color = |token: u32| {
        let start = token as usize * 3;
        [palette[start], palette[start + 1], palette[start + 2]]
    };
    let at = |column: u32, row: u32, x: u32, y: u32| {
        drawn.get_pixel(2 + 10 * column + x, 2 + 10 * row + y).0
    };
    assert_eq!(at(0, 1, 3, 6), color(images[1][6 * 8 + 3]), "the image");
    assert_eq!(at(1, 1, 3, 2), color(images[1][2 * 8 + 3]), "what is kept");
    assert_eq!(at(1, 1, 3, 4), [196; 3], "what is not");
    assert_eq!(
        at(4, 1, 3, 6),
        color(likeliest(&images[1][..32])[6 * 8 + 3])
    );

    // A mask that keeps the lower rows alone: light below.
    let mask = image::GrayImage::from_fn(16, 16, |_, y| image::Luma([if y < 8 { 0 } else { 255 }]));
    mask.save(pictures.path("mask.bmp")).expect("saved");
    let mask = pictures.text("mask.bmp");
    let arguments = [
        "generate",
        "--input",
        &inputs[0],
        "--mask",
        &mask,
        "--samples",
        "1",
        "--output",
        &sheet,
        "--save-samples",
        &samples,
    ];
    let said = run(&running, &arguments).await.expect("a run");
    assert!(said.text.contains("seed "), "{}", said.text);
    let got = std::fs::read(pictures.path("samples/00-0.png")).expect("a sample");
    let got = image::load_from_memory(&got).expect("a PNG").into_rgb8();
    assert_eq!(got.dimensions(), (32, 32), "four pixels for one");
    assert_eq!(got.get_pixel(13, 25).0, color(images[0][6 * 8 + 3]), "kept");

    for (flags, words) in [
        (["--rows", "9"], "--rows is 9"),
        (["--mask", &sheet[..5]], "--mask"),
        (["--output", "/nowhere/sheet.png"], "--output /nowhere"),
        (["--temperature", "-1"], "temperature: -1"),
    ] {
        let mut arguments = vec!["generate", "--input", &inputs[0], "--samples", "1"];
        arguments.extend(flags);
        let error = run(&running, &arguments).await.err().expect(words);
        assert!(format!("{error:#}").contains(words), "{error:#}");
    }
    running.end().await;
}

#[tokio::test]
async fn a_seed_repeats_samples_over_several_calls() {
    let running = fake(2, Duration::ZERO, &["--samples-per-call-max", "2"]).await;
    let folder = tempfile::tempdir().expect("a folder");
    let sheet = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    let draw = async |seed: &str, samples: &str, name: &str| {
        let output = sheet(name);
        let arguments = [
            "generate",
            "--seed",
            seed,
            "--samples",
            samples,
            "--json",
            "--output",
            &output,
        ];
        let said = run(&running, &arguments).await.expect("a run");
        let likely = said.json().into_iter().map(|line| {
            assert_eq!(line["seed"].to_string(), seed);
            line["log_prob_sum"].as_f64().expect("a number").to_bits()
        });
        likely.collect::<Vec<u64>>()
    };
    let five = draw("7", "5", "a.png").await;
    assert_eq!(draw("7", "5", "b.png").await, five);
    let bytes = |name: &str| std::fs::read(sheet(name)).expect("a sheet");
    assert_eq!(bytes("a.png"), bytes("b.png"));
    let distinct: std::collections::BTreeSet<&u64> = five.iter().collect();
    assert_eq!(distinct.len(), 5, "no call repeats another's samples");
    assert_eq!(draw("7", "2", "c.png").await, five[..2]);
    running.end().await;
}

#[tokio::test]
async fn whoever_is_told_to_end_leaves_neither_files_nor_work() {
    let running = fake(2, Duration::from_millis(20), &[]).await;
    let folder = tempfile::tempdir().expect("a folder");
    let sheet = folder.path().join("sheet.png");
    let arguments = ["generate", "--output", sheet.to_str().expect("UTF-8")];
    let begun = running.until_in_flight(8);
    let said = run_until(&running, &arguments, begun).await.expect("a run");
    assert_eq!(said.outcome, CommandOutcome::Interrupted);
    assert_eq!(
        std::fs::read_dir(folder.path()).expect("a folder").count(),
        0
    );
    running.until_in_flight(0).await;
    running.end().await;
}

#[tokio::test]
async fn what_cannot_be_read_is_left_out_and_odd_names_stay_on_their_line() {
    use std::os::unix::fs::symlink;

    let running = harness::fake(Script::default(), &[]).await;
    let pictures = Pictures::new(&running, &[seeded(1), seeded(2)]).await;
    symlink(".", pictures.path("up")).expect("a link");
    symlink("gone.png", pictures.path("nowhere.png")).expect("a link");
    process::make_pipe(&pictures.path("pipe.png"));
    std::fs::create_dir(pictures.path("deep")).expect("a folder");
    symlink("..", pictures.path("deep/loop")).expect("a link");
    std::fs::rename(pictures.path("01.png"), pictures.path("a\nb\t.png")).expect("renamed");
    for command in ["tokenize", "classify"] {
        let said = run(&running, &[command, pictures.folder()]).await;
        let said = said.expect("a run");
        assert_eq!(said.outcome, CommandOutcome::Failed);
        let lines: Vec<&str> = said.text.lines().collect();
        let names = &lines[lines.len() - 2..];
        assert!(names[0].contains("00.png"), "{lines:?}");
        assert!(names[1].contains("a\\nb\\t.png"), "{lines:?}");
    }
    let said = run(&running, &["tokenize", &pictures.text("pipe.png")]).await;
    let said = said.expect("a run");
    assert_eq!(
        (said.outcome, said.text.as_str()),
        (CommandOutcome::Failed, "")
    );
    let cli = ["neighbors", pictures.folder(), "--endpoint"];
    let endpoint = running.url();
    let output = tokio::task::spawn_blocking({
        let cli = cli.map(str::to_owned);
        move || imagegpt(&[&cli[0], &cli[1], &cli[2], &endpoint], b"")
    });
    let output = output.await.expect("no panic");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    for name in ["up", "nowhere.png", "pipe.png", "deep/loop"] {
        let line = format!("imagegpt: {}: ", pictures.text(name));
        assert_eq!(told.matches(&line).count(), 1, "{told}");
        assert_eq!(text.matches(name).count(), 0, "{text}");
    }
    assert_eq!(told.lines().count(), 4, "{told}");
    assert!(text.contains("a\\nb\\t"), "{text}");
    running.end().await;
}

#[tokio::test]
async fn neighbors_take_what_the_other_commands_take() {
    let running = harness::fake(Script::default(), &[]).await;
    let images: Vec<Vec<u32>> = (0..5).map(seeded).collect();
    let pictures = Pictures::new(&running, &images).await;
    let (list, picture) = (pictures.text("list"), pictures.text("picture.png"));
    let listed = [2, 3, 4].map(|idx| pictures.text(&format!("{idx:02}.png")));
    std::fs::write(&list, listed.join("\n")).expect("written");
    let files = [pictures.text("00.png"), pictures.text("01.png")];
    let arguments = [
        "neighbors",
        &files[0],
        &files[1],
        "--list",
        &list,
        "--alpha",
        "white",
        "--neighbors",
        "2",
        "--json",
        "--picture",
        &picture,
    ];
    let said = run(&running, &arguments).await.expect("a run");
    assert_eq!(said.outcome, CommandOutcome::Done);
    let lines = said.json();
    let all: Vec<&str> = files.iter().chain(&listed).map(String::as_str).collect();
    let names: Vec<&str> = lines
        .iter()
        .map(|line| line["file"].as_str().expect("a file"))
        .collect();
    assert_eq!(names, all);
    for line in &lines {
        let neighbors = line["neighbors"].as_array().expect("neighbors");
        let similarity = |idx: usize| neighbors[idx]["similarity"].as_f64().expect("a number");
        assert_eq!(neighbors.len(), 2);
        assert!(similarity(0) >= similarity(1), "{line}");
        for neighbor in neighbors {
            let file = neighbor["file"].as_str().expect("a file");
            assert!(all.contains(&file) && line["file"] != file, "{line}");
        }
    }
    assert!(size(Path::new(&picture)).0 > 0);

    // An even sample, and bad files beside it.
    let missing = pictures.text("missing.png");
    let arguments = ["neighbors", pictures.folder(), "--images-max", "3"];
    let said = run(&running, &[&arguments[..], &["--json"]].concat()).await;
    let sampled: Vec<String> = said
        .expect("a run")
        .json()
        .iter()
        .map(|line| line["file"].as_str().expect("a file").to_owned())
        .collect();
    let even = ["00.png", "02.png", "04.png"].map(|name| pictures.text(name));
    assert_eq!(sampled, even);
    let said = run(&running, &[&arguments[..], &[&missing]].concat()).await;
    assert_eq!(said.expect("a run").outcome, CommandOutcome::Failed);
    let said = run(&running, &["neighbors", &files[0], &files[1], &missing]).await;
    let said = said.expect("a run");
    assert_eq!(said.outcome, CommandOutcome::Failed);
    assert!(
        said.text.starts_with("model micro (sha256:"),
        "{}",
        said.text
    );

    // One has no neighbors.
    let error = run(&running, &["neighbors", &files[0]]).await;
    let error = error.err().expect("an error").to_string();
    assert!(error.contains("images that have an answer: 1"), "{error}");
    assert!(error.contains("at least 2"), "{error}");
    let said = run(&running, &["neighbors", &files[0], &missing]).await;
    let said = said.expect("a run");
    assert_eq!(
        (said.outcome, said.text.as_str()),
        (CommandOutcome::Failed, "")
    );
    let error = run(
        &running,
        &["neighbors", &files[0], &files[1], "--head", "pets"],
    )
    .await;
    let error = error.err().expect("an error").to_string();
    assert!(error.contains("--head pets"), "{error}");
    running.end().await;
}

/// Runs a command with a worker's endpoint, and with the model itself.
fn both_ways(running: &Running, arguments: &[&str], model: &str) -> [Output; 2] {
    let endpoint = format!("http://{}", running.worker.grpc_addr);
    [["--endpoint", &endpoint], ["--model", model]].map(|way| {
        let all = [arguments, &way].concat();
        imagegpt(&all, b"")
    })
}

/// Tokens are the same with and without a worker, and need no ONNX Runtime,
/// whose path does not exist here.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_the_same_without_a_worker() {
    let running = harness::fake(Script::default(), &[]).await;
    let model = harness::model_dir("micro");
    let model = model.to_str().expect("UTF-8");
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/images");
    let folder = tempfile::tempdir().expect("a folder");
    let bad = |name: &str, bytes: &[u8]| {
        std::fs::write(folder.path().join(name), bytes).expect("written");
    };
    let whole = std::fs::read(format!("{golden}/bmp-rgb.bmp")).expect("a file");
    let png = std::fs::read(format!("{golden}/emoji-1f308.png")).expect("a file");
    bad("empty.png", b"");
    bad("text.png", b"<html>no image</html>");
    bad("cut.png", &png[..png.len() / 2]);
    bad("cut.bmp", &whole[..20]);
    let sparse = std::fs::File::create(folder.path().join("large.png")).expect("a file");
    sparse.set_len(100 << 20).expect("a length");
    let bad = folder.path().to_str().expect("UTF-8");
    let few = format!("{PICTURES}/food-drink");
    for (flags, pictures, n_good) in [
        (&["--json"][..], golden, 100),
        (&["--alpha", "white"], &few, 5),
        (&["--fit", "center-crop"], &few, 5),
    ] {
        let arguments = [&["tokenize", pictures, bad, "/nowhere.png"], flags].concat();
        let [asked, own] = tokio::task::block_in_place(|| both_ways(&running, &arguments, model));
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
        assert_eq!(text(&own.stdout), text(&asked.stdout));
        assert_eq!(text(&own.stderr), text(&asked.stderr));
        assert_eq!(own.status.code(), Some(1), "{}", text(&own.stderr));
        assert_eq!(asked.status.code(), Some(1));
        assert!(text(&own.stdout).lines().count() >= n_good);
        let told = text(&own.stderr);
        assert!(
            told.contains("(--image-bytes-max, --request-bytes-max)"),
            "{told}"
        );
        for name in ["empty.png", "text.png", "cut.png", "cut.bmp", "large.png"] {
            assert!(told.contains(name), "{told}");
        }
    }
    let output = process::program()
        .env("ORT_DYLIB_PATH", "/nowhere/libonnxruntime.so")
        .args([
            "tokenize",
            &format!("{golden}/bmp-rgb.bmp"),
            "--model",
            model,
        ])
        .output()
        .expect("started");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{told}");
    // Limits are those of the worker that --serve describes.
    let flags = ["--serve", "--image-pixels-max 4"];
    let one = format!("{golden}/bmp-rgb.bmp");
    let output = imagegpt(
        &[&["tokenize", &one, "--model", model], &flags[..]].concat(),
        b"",
    );
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("--image-pixels-max"), "{told}");
    running.end().await;
}

/// Flags that would have no effect are refused before any call.
#[test]
fn flags_without_their_model_are_refused() {
    let serve = ["tokenize", "a.png", "--serve", "--log info"];
    let endpoint = ["--endpoint", "http://127.0.0.1:1"];
    for (arguments, expected) in [
        (serve.to_vec(), "--model <SOURCE>"),
        ([&serve[..], &endpoint].concat(), "cannot be used with"),
        (vec!["classify", "a.png", "--head", "=x"], "NAME=FILE"),
        (vec!["classify", "a.png", "--head", "a="], "NAME=FILE"),
    ] {
        let output = imagegpt(&arguments, b"");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(expected), "{said}");
    }
}

/// A variable for all commands does not contradict a flag of this one; a flag
/// does.
#[test]
fn a_model_needs_no_endpoint() {
    let tokenize = |more: &[&str]| {
        let model = harness::model_dir("micro");
        let output = process::program()
            .args(["tokenize", &format!("{PICTURES}/flags"), "--model"])
            .arg(model)
            .args(more)
            .env("IMAGEGPT_ENDPOINT", "http://127.0.0.1:1")
            .output()
            .expect("the program");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    };
    let (code, said) = tokenize(&[]);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = tokenize(&["--endpoint", "http://127.0.0.1:1"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("cannot be used with"), "{said}");
}

#[test]
fn inspect_says_what_it_shows() {
    for (source, expected) in [
        ("random:tiny", "it is a source, not yet compiled"),
        ("openai/imagegpt-small", "it is a source, not yet compiled"),
        ("/nowhere", "there is no such directory"),
        (PICTURES, "it has no imagegpt.json"),
    ] {
        let output = imagegpt(&["inspect", source], b"");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(&format!("{source}: {expected}; ")), "{said}");
    }
}

/// Outputs that cannot be written are refused before any call; no worker runs
/// here.
#[test]
fn a_sheet_that_cannot_be_written_is_told_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    std::fs::write(at("file"), b"").expect("a file");
    for flags in [
        ["--output", &at("none/sheet.png")],
        ["--output", &at("")],
        ["--output", &at("file/sheet.png")],
        ["--save-samples", &at("file")],
        ["--picture", &at("none/neighbors.png")],
        ["--picture", &at("")],
    ] {
        let sheet = at("sheet.png");
        let mut arguments = match flags[0] {
            "--picture" => vec!["neighbors", PICTURES],
            _ => vec!["generate"],
        };
        arguments.extend(["--endpoint", "http://127.0.0.1:1"]);
        if flags[0] == "--save-samples" {
            arguments.extend(["--output", &sheet]);
        }
        arguments.extend(flags);
        let output = imagegpt(&arguments, b"");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(flags[0]), "{said}");
    }
}

/// A mistyped variable has no effect, which is said and is no error; the value,
/// which may be a secret, is not repeated.
#[test]
fn variables_that_nothing_reads_are_named() {
    let said = |arguments: &[&str], name: &str| {
        let mut command = process::program();
        command.args(arguments).env(name, "s3cret");
        let output = command.output().expect("an end");
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let said = process::said(&output);
        assert!(!said.contains("s3cret"), "{said}");
        said
    };
    let (wrong, right) = ("IMAGEGPT_MAX_BATCHSIZE", "IMAGEGPT_MAX_BATCH_SIZE");
    for arguments in [
        &["serve", "--model", "/nowhere", "--log-format", "json"][..],
        &["serve", "--model", "/nowhere"],
        &["inspect", "/nowhere"],
        &["score", "--model", "/nowhere", PICTURES],
    ] {
        let text = said(arguments, wrong);
        let lines = text.lines().filter(|line| line.contains(wrong));
        let lines: Vec<&str> = lines.collect();
        assert_eq!(lines.len(), 1, "{text}");
        assert!(
            lines[0].contains(right) && lines[0].contains("no effect"),
            "{text}"
        );
        let text = said(arguments, "IMAGEGPT_BINARY");
        assert!(!text.contains("no effect"), "{text}");
    }
}

/// A path that is mistyped is no model of a hub: nothing is asked there.
#[test]
fn a_mistyped_directory_is_refused_before_the_hub_is_asked() {
    let hub = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    hub.set_nonblocking(true).expect("set");
    let address = format!("http://{}", hub.local_addr().expect("an address"));
    let cache = tempfile::tempdir().expect("a folder");
    let output = cache.path().join("out");
    let output = output.to_str().expect("UTF-8");
    for arguments in [
        &["serve", "--model", "models/emojy"][..],
        &["serve", "--model", "./modles/emoji"],
        &["compile", "models/emojy", "--output", output],
        &["tokenize", "--model", "models/emojy", PICTURES],
        &["doctor", "--model", "models/emojy"],
    ] {
        let mut command = process::program();
        command.args(arguments).env("HF_ENDPOINT", &address);
        command.env("HF_HOME", cache.path());
        let output = command.output().expect("an end");
        let said = process::said(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(
            said.contains("models/emoji is one"),
            "{arguments:?}: {said}"
        );
        let asked = hub.accept().expect_err("nobody asks");
        assert_eq!(asked.kind(), std::io::ErrorKind::WouldBlock);
    }
}

/// Runs the program with `input` on standard input.
fn imagegpt(arguments: &[&str], input: &[u8]) -> Output {
    let mut child = process::program()
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let mut stdin = child.stdin.take().expect("a pipe");
    // Whoever needs none of it closes the pipe.
    let _ = stdin.write_all(input);
    drop(stdin);
    child.wait_with_output().expect("ended")
}

#[test]
fn standard_input_standard_error_and_exit_codes() {
    let folder = tempfile::tempdir().expect("a folder");
    let picture = image::RgbImage::from_pixel(20, 10, image::Rgb([200, 30, 90]));
    let good = folder.path().join("good.png");
    picture.save(&good).expect("saved");
    let good = good.to_str().expect("UTF-8");
    let png = std::fs::read(good).expect("a file");
    let model = harness::model_dir("micro");
    let own = [
        "--model",
        model.to_str().expect("UTF-8"),
        "--serve",
        "--fake-engine 0s",
    ];
    let run = |arguments: &[&str], input: &[u8]| imagegpt(&[arguments, &own].concat(), input);
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");

    let output = run(&["tokenize", "-", "/nowhere.png", good], &png);
    let lines = text(&output.stdout);
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines.len(), 2, "{}", text(&output.stderr));
    assert_eq!(lines[0].replace('-', good), lines[1], "the same image");
    let complaint = text(&output.stderr);
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
    assert!(
        complaint.contains("/nowhere.png: there is no such file"),
        "{complaint}"
    );
    assert_eq!(output.status.code(), Some(1));

    let list = format!("{good}\n{good}\n");
    let output = run(&["classify", "--list", "-", "--json"], list.as_bytes());
    assert_eq!(text(&output.stdout).lines().count(), 2);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));

    let output = run(&["neighbors", "-", good, "--json"], &png);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let lines = text(&output.stdout);
    let files: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("a JSON object")["file"].clone())
        .collect();
    assert_eq!(files, ["-", good]);

    let output = run(&["tokenize", "-", "-"], &png);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("only once"));
    let output = run(&["tokenize", good, "--endpoint", "http://127.0.0.1:1"], b"");
    assert_eq!(
        output.status.code(),
        Some(2),
        "both an endpoint and a model"
    );
    let output = imagegpt(&["score", good, "--endpoint", "http://127.0.0.1:1"], b"");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("no worker answers"));
}
