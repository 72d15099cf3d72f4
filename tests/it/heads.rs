//! Linear heads whose files say how they must be used: the model, and the way
//! in which images become tokens.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use imagegpt::compile::{CompileOptions, ModelSource, Silent, compile};
use imagegpt::imaging::{Alpha, Fit};
use imagegpt::model::graph::{Context, Norm};
use imagegpt::model::head::{HeadFile, LinearHead};
use imagegpt::model::manifest::Manifest;
use imagegpt::model::precision::Precision;
use imagegpt::model::{ClassActivation, Model};
use imagegpt::proto::inference as oip;
use imagegpt::proto::inference::infer_parameter::ParameterChoice;
use imagegpt::proto::pb;
use tonic::Code;

use crate::compiled::{classification, compiled_folder, copy_all, run, runtime, text};
use crate::harness::{self, Running, encoded, f32s};
use crate::oip::{client, files, golden, infer, outputs, parameters, tensor, word};
use crate::process;

/// Picture with colors under its transparent pixels that are not white.
const PICTURE: &str = "emoji-1f308.png";

/// Returns a head of 2 classes over the 16 features of the micro checkpoint's
/// layer 1, which says nothing about how it must be used.
fn plain() -> HeadFile {
    HeadFile {
        labels: ["plus", "minus"].map(String::from).into(),
        activation: ClassActivation::Softmax,
        layer: 1,
        norm: Norm::None,
        context: Context::Raw,
        fit: None,
        alpha: None,
        weights_digest: None,
        figures: BTreeMap::new(),
        tool_version: None,
        weight: ndarray::Array2::from_shape_fn((2, 16), |(class, idx)| {
            let sign = if class == 0 { 1.0 } else { -1.0 };
            sign / (1.0 + f32::from(u8::try_from(idx).expect("few")))
        }),
        bias: vec![0.5, 0.0],
    }
}

/// Writes a head into a file, and returns the value of `--head`.
fn write(folder: &Path, name: &str, head: &HeadFile) -> String {
    let file = folder.join(format!("{name}.safetensors"));
    head.write(&file).expect("written");
    format!("{name}={}", file.display())
}

/// Compiles the micro checkpoint into a directory with features up to layer 1.
fn micro(folder: &Path) -> PathBuf {
    let output = folder.join("micro");
    let options = CompileOptions {
        feature_layer: Some(1),
        ..Default::default()
    };
    let source = ModelSource::Folder(harness::model_dir("micro-checkpoint"));
    compile(&source, &output, &options, &runtime(), &mut Silent).expect("compiled");
    output
}

/// Makes a call of Classify for [`PICTURE`]; 0 leaves an option unset.
fn call(head: &str, fit: pb::Fit, alpha: pb::Alpha) -> pb::ClassifyRequest {
    pb::ClassifyRequest {
        images: vec![encoded(golden(PICTURE))],
        preprocess: Some(pb::Preprocess {
            fit: fit.into(),
            alpha: alpha.into(),
        }),
        head: head.to_owned(),
        logits: true,
        ..Default::default()
    }
}

/// Returns the logits, and the options that were applied.
async fn classify(running: &Running, call: pb::ClassifyRequest) -> (Vec<f32>, pb::Preprocess) {
    let mut client = running.client.clone();
    let response = client.classify(call).await.expect("a response");
    let response = response.into_inner();
    let found = classification(&response.results[0]);
    let logits = f32s(found.logits.as_ref().expect("logits"));
    (logits, response.preprocess.expect("the applied options"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_decides_how_images_become_tokens() {
    let folder = tempfile::tempdir().expect("a directory");
    let output = micro(folder.path());
    let model = Model::open(&output, None).expect("a model");
    let white = HeadFile {
        alpha: Some(Alpha::White),
        weights_digest: Some(model.weights_digest.clone()),
        ..plain()
    };
    let cropped = HeadFile {
        fit: Some(Fit::CenterCrop),
        alpha: Some(Alpha::Drop),
        ..plain()
    };
    let heads = [("old", &plain()), ("white", &white), ("cropped", &cropped)]
        .map(|(name, head)| write(folder.path(), name, head));
    let flags: Vec<&str> = heads.iter().flat_map(|head| ["--head", head]).collect();
    let flags = [&flags, &["--max-batch-size", "1"][..]].concat();
    let running = harness::start(&output, &flags, None).await;

    let info = running
        .client
        .clone()
        .get_model(pb::GetModelRequest {})
        .await;
    let info = info.expect("a model").into_inner();
    assert_eq!(info.weights_digest, model.weights_digest);
    assert_ne!(info.weights_digest, info.digest);
    assert_eq!(info.head_default, "", "the checkpoint has its own head");
    let facts = |head: &pb::Head| (head.fit(), head.alpha(), head.weights_digest.clone());
    let facts: Vec<_> = info.heads.iter().map(facts).collect();
    let none = String::new();
    let expected = [
        (pb::Fit::Unspecified, pb::Alpha::Unspecified, none.clone()),
        (pb::Fit::Unspecified, pb::Alpha::White, model.weights_digest),
        (pb::Fit::CenterCrop, pb::Alpha::Drop, none),
    ];
    assert_eq!(facts, expected);

    let (no_fit, no_alpha) = (pb::Fit::Unspecified, pb::Alpha::Unspecified);
    let ask = async |head, fit, alpha| classify(&running, call(head, fit, alpha)).await;
    let applied = |fit: pb::Fit, alpha: pb::Alpha| pb::Preprocess {
        fit: fit.into(),
        alpha: alpha.into(),
    };
    // The old head has the worker's defaults, and takes any other value.
    let dropped = ask("old", no_fit, no_alpha).await;
    assert_eq!(dropped.1, applied(pb::Fit::Squash, pb::Alpha::Drop));
    let on_white = ask("old", no_fit, pb::Alpha::White).await;
    assert_eq!(on_white.1, applied(pb::Fit::Squash, pb::Alpha::White));
    assert_ne!(dropped.0, on_white.0, "the picture is transparent");
    // The others have their own, and all heads have the same numbers.
    assert_eq!(ask("white", no_fit, no_alpha).await, on_white);
    assert_eq!(ask("white", no_fit, pb::Alpha::White).await, on_white);
    let both = ask("old", pb::Fit::CenterCrop, pb::Alpha::White).await;
    assert_eq!(ask("white", pb::Fit::CenterCrop, no_alpha).await, both);
    let in_center = ask("old", pb::Fit::CenterCrop, pb::Alpha::Drop).await;
    assert_eq!(ask("cropped", no_fit, no_alpha).await, in_center);

    for (call, words) in [
        (
            call("white", no_fit, pb::Alpha::Drop),
            "preprocess.alpha: the head white was trained with ALPHA_WHITE; leave \
             preprocess.alpha unset",
        ),
        (
            call("cropped", pb::Fit::Squash, no_alpha),
            "preprocess.fit: the head cropped was trained with FIT_CENTER_CROP; leave \
             preprocess.fit unset",
        ),
    ] {
        let error = running.client.clone().classify(call).await;
        let error = error.expect_err("another option");
        assert_eq!(
            (error.code(), error.message()),
            (Code::InvalidArgument, words)
        );
    }
    open_inference(&running, &dropped.0, &on_white.0).await;
    commands(&running, folder.path());
    running.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_head_of_a_checkpoint_without_its_own_is_the_default() {
    let folder = tempfile::tempdir().expect("a directory");
    let output = folder.path().join("micro");
    compiled_folder(&output, Precision::Fp32);
    let white = HeadFile {
        alpha: Some(Alpha::White),
        ..plain()
    };
    let flag = write(folder.path(), "white", &white);
    let running = harness::start(&output, &["--head", &flag], None).await;
    let info = running
        .client
        .clone()
        .get_model(pb::GetModelRequest {})
        .await;
    assert_eq!(info.expect("a model").into_inner().head_default, "white");
    let unset = || call("", pb::Fit::Unspecified, pb::Alpha::Unspecified);
    let (_, applied) = classify(&running, unset()).await;
    assert_eq!(applied.alpha(), pb::Alpha::White);
    let pictures = folder.path().join("pictures");
    std::fs::create_dir(&pictures).expect("a directory");
    std::fs::write(pictures.join("1.png"), golden(PICTURE)).expect("written");
    let (url, job) = (running.url(), folder.path().join("job"));
    let (code, said) = tokio::task::block_in_place(|| {
        let (pictures, job) = (text(&pictures), text(&job));
        let task = ["--task", "classify", "--endpoint", &url];
        run(&[&["embed", pictures, "--output", job], &task[..]].concat())
    });
    assert_eq!(code, 0, "{said}");
    let manifest = std::fs::read_to_string(job.join("_imagegpt/manifest.json"));
    let manifest = manifest.expect("a manifest");
    assert!(manifest.contains("\"--alpha\": \"white\""), "{manifest}");
    running.end().await;
}

/// Checks the same over the Open Inference Protocol.
async fn open_inference(running: &Running, dropped: &[f32], on_white: &[f32]) {
    let mut client = client(running).await;
    let request = |head: &str, options: &[(&str, ParameterChoice)], names: &[&str]| {
        let options = [&[("head", word(head))], options].concat();
        let mut request = files(&[&golden(PICTURE)]);
        request.outputs = outputs(names);
        request.parameters = parameters(&options);
        request
    };
    let bytes = |logits: &[f32]| -> Vec<u8> {
        logits
            .iter()
            .flat_map(|logit| logit.to_le_bytes())
            .collect()
    };
    let white = [("alpha", word("white"))];
    for (head, options, names, logits, is_told) in [
        ("old", &[][..], &["logits"][..], dropped, false),
        ("old", &white, &["logits"], on_white, false),
        ("white", &[], &["logits"], on_white, true),
        ("white", &white, &["embedding", "logits"], on_white, true),
    ] {
        let request = request(head, options, names);
        let response = infer(&mut client, &request).await.expect("an answer");
        let what = format!("{head} {names:?}");
        assert_eq!(tensor(&response, "logits").2, bytes(logits), "{what}");
        let told = if is_told {
            parameters(&[("fit", word("squash")), ("alpha", word("white"))])
        } else {
            parameters(&[])
        };
        // The other parameters are the times of the request.
        let mut options = response.parameters;
        options.retain(|name, _| ["fit", "alpha"].contains(&name.as_str()));
        assert_eq!(options, told, "{what}");
    }
    for (options, names, words) in [
        (
            &[("alpha", word("drop"))][..],
            &["logits"][..],
            "preprocess.alpha: the head white was trained with ALPHA_WHITE",
        ),
        (
            &[],
            &["embedding", "logits"],
            "alpha: the head white was trained with white, and the other outputs have drop by \
             default; set alpha to white for the whole request",
        ),
    ] {
        let request = request("white", options, names);
        let error = infer(&mut client, &request).await.expect_err(words);
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains(words), "{error}");
    }
    let request = oip::ModelMetadataRequest {
        name: "micro".to_owned(),
        ..Default::default()
    };
    let metadata = client.model_metadata(request).await.expect("metadata");
    let properties = metadata.into_inner().properties;
    let of = |name: &str| properties.get(name).map(String::as_str);
    assert!(of("weights_digest").is_some_and(|digest| digest.starts_with("sha256:")));
    assert_eq!(
        (of("fit.cropped"), of("alpha.white")),
        (Some("center_crop"), Some("white"))
    );
    assert_eq!((of("fit.white"), of("alpha.old")), (None, None));
}

/// Checks that the commands send no default of their own.
fn commands(running: &Running, folder: &Path) {
    let pictures = folder.join("pictures");
    std::fs::create_dir(&pictures).expect("a directory");
    for name in ["1.png", "2.png"] {
        std::fs::write(pictures.join(name), golden(PICTURE)).expect("written");
    }
    let url = running.url();
    let ask = |command: &str, flags: &[&str]| {
        let fixed = [command, text(&pictures), "--endpoint", &url, "--json"];
        tokio::task::block_in_place(|| run(&[&fixed, flags].concat()))
    };
    for (command, flags) in [("classify", &[][..]), ("neighbors", &["--neighbors", "1"])] {
        let ask = |more: &[&str]| {
            let (code, said) = ask(command, &[flags, more].concat());
            assert_eq!(code, 0, "{said}");
            // The heads differ in their names alone.
            said.replace("\"head\":\"old\",", "")
                .replace("\"head\":\"white\",", "")
        };
        let old = ask(&["--head", "old"]);
        let on_white = ask(&["--head", "old", "--alpha", "white"]);
        assert_ne!(old, on_white);
        assert_eq!(ask(&["--head", "white"]), on_white);
        assert_eq!(ask(&["--head", "white", "--alpha", "white"]), on_white);
    }
    let (code, said) = ask("classify", &["--head", "white", "--alpha", "drop"]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("was trained with ALPHA_WHITE"), "{said}");
}

#[test]
fn a_job_records_the_options_of_its_head_and_goes_on() {
    let folder = tempfile::tempdir().expect("a directory");
    let model = micro(folder.path());
    let pictures = folder.path().join("pictures");
    std::fs::create_dir(&pictures).expect("a directory");
    std::fs::write(pictures.join("1.png"), golden(PICTURE)).expect("written");
    let white = HeadFile {
        alpha: Some(Alpha::White),
        ..plain()
    };
    let (old, white) = (
        write(folder.path(), "old", &plain()),
        write(folder.path(), "white", &white),
    );
    // Both are served under one name, so that only their options can differ.
    let serve = |head: &str| {
        let (_, file) = head.split_once('=').expect("a flag");
        format!("--head pets={file}")
    };
    let (old, white) = (serve(&old), serve(&white));
    let embed = |output: &Path, serve: &str, flags: &[&str]| {
        let fixed = [
            "embed",
            text(&pictures),
            "--task",
            "classify",
            "--head",
            "pets",
            "--model",
            text(&model),
            "--output",
            text(output),
            "--serve",
            serve,
        ];
        run(&[&fixed, flags].concat())
    };
    let options = |output: &Path| -> serde_json::Value {
        let text = std::fs::read(output.join("_imagegpt/manifest.json")).expect("a manifest");
        let manifest: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        manifest["options"].clone()
    };
    let part =
        |output: &Path| std::fs::read(output.join("part-00000-00000.parquet")).expect("a part");
    let [by_flag, by_head, by_default] =
        ["flag", "head", "default"].map(|name| folder.path().join(name));
    for (output, serve, flags, alpha) in [
        (&by_flag, &old, &["--alpha", "white"][..], "white"),
        (&by_head, &white, &[], "white"),
        (&by_default, &old, &[], "drop"),
    ] {
        let (code, said) = embed(output, serve, flags);
        assert_eq!(code, 0, "{said}");
        let options = options(output);
        assert_eq!(
            (&options["--alpha"], &options["--fit"]),
            (&alpha.into(), &"squash".into())
        );
    }
    assert_eq!(part(&by_head), part(&by_flag));
    assert_ne!(part(&by_head), part(&by_default));
    // A job goes on if the options are the same, wherever they come from.
    let (code, said) = embed(&by_flag, &white, &[]);
    assert_eq!(code, 0, "{said}");
    let (code, said) = embed(&by_default, &white, &[]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("--alpha was drop, is now white"), "{said}");
    let (code, said) = embed(&by_head, &white, &["--alpha", "drop"]);
    assert_eq!(code, 2, "{said}");
    let words = "--alpha drop: the head pets was trained with white; leave --alpha out";
    assert!(said.contains(words), "{said}");
}

#[test]
fn a_head_is_for_the_weights_it_was_trained_on() {
    let folder = tempfile::tempdir().expect("a directory");
    let at = |name: &str| folder.path().join(name);
    compiled_folder(&at("fp32"), Precision::Fp32);
    compiled_folder(&at("int8"), Precision::Int8);
    let open = |name: &str| Model::open(&at(name), None).expect("a model");
    let (fp32, int8) = (open("fp32"), open("int8"));
    assert_ne!(fp32.digest, int8.digest);
    assert_eq!(fp32.weights_digest, int8.weights_digest);
    let sha256 = Manifest::read(&at("int8"))
        .expect("a manifest")
        .source
        .sha256;
    assert_eq!(int8.weights_digest, format!("sha256:{sha256}"));
    let head = HeadFile {
        weights_digest: Some(fp32.weights_digest.clone()),
        ..plain()
    };
    let flag = write(folder.path(), "pets", &head);
    let head = LinearHead::open(&flag.parse().expect("a flag")).expect("a head");
    for model in [&fp32, &int8] {
        head.check(model).expect("the weights of the head");
    }
    // The digest covers config.json and the weights, not where they are.
    copy_all(&harness::model_dir("micro-checkpoint"), &at("copy"));
    let compile_copy = |output: &str| {
        let source = ModelSource::Folder(at("copy"));
        let options = CompileOptions {
            feature_layer: Some(1),
            ..Default::default()
        };
        compile(&source, &at(output), &options, &runtime(), &mut Silent).expect("compiled");
        open(output)
    };
    head.check(&compile_copy("elsewhere"))
        .expect("the same files");
    let config = std::fs::read_to_string(at("copy/config.json")).expect("a file");
    std::fs::write(at("copy/config.json"), config.replace("circle", "disc")).expect("written");
    let other = compile_copy("other");
    assert_ne!(other.weights_digest, fp32.weights_digest);
    let (code, said) = run(&[
        "classify",
        concat!(env!("CARGO_MANIFEST_DIR"), "/models/pictures/flags"),
        "--model",
        text(&at("other")),
        "--head",
        &flag,
    ]);
    assert_eq!(code, 2, "{said}");
    let sentence = format!(
        "--head {flag}: the head was trained on the weights {}, and the model other has the \
         weights {}; give --model the model that the head was trained on, or train the head again",
        fp32.weights_digest, other.weights_digest
    );
    assert!(said.contains(&sentence), "{said}");
    // A layer after the feature layer, and one after the last.
    for (layer, words) in [
        (0, Ok(())),
        (
            1,
            Err(
                "serves pooled features of layers 0 and 2; start the worker with --feature-layer 1",
            ),
        ),
        (
            3,
            Err("trained on layer 3, and the model shallow has 2 layers"),
        ),
    ] {
        let shallow = at("shallow");
        if !shallow.exists() {
            let source = ModelSource::Folder(harness::model_dir("micro-checkpoint"));
            let options = CompileOptions {
                feature_layer: Some(0),
                ..Default::default()
            };
            compile(&source, &shallow, &options, &runtime(), &mut Silent).expect("compiled");
        }
        let flag = write(folder.path(), "deep", &HeadFile { layer, ..plain() });
        let head = LinearHead::open(&flag.parse().expect("a flag")).expect("a head");
        match (head.check(&open("shallow")), words) {
            (Ok(()), Ok(())) => {}
            (Err(error), Err(words)) => assert!(error.to_string().contains(words), "{error}"),
            (got, _) => panic!("layer {layer}: {got:?}"),
        }
    }
}

/// Names and layers of the heads that the worker has now.
async fn names(running: &Running) -> Vec<String> {
    let info = running
        .client
        .clone()
        .get_model(pb::GetModelRequest {})
        .await;
    let info = info.expect("a model").into_inner();
    info.heads.into_iter().map(|head| head.name).collect()
}

/// Waits until that many heads of the directory were reloaded.
async fn until_reloaded(running: &Running, n: f64) {
    let series = "imagegpt_reloads_total{file=\"heads\"}";
    harness::until_sample(&running.worker, series, |found| found == n).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_of_a_directory_follow_its_files() {
    let folder = tempfile::tempdir().expect("a directory");
    let output = micro(folder.path());
    let dir = folder.path().join("heads");
    std::fs::create_dir(&dir).expect("a directory");
    let put = |name: &str, bytes: &[u8]| {
        // As a program does that replaces a file.
        let part = dir.join(".part");
        std::fs::write(&part, bytes).expect("written");
        std::fs::rename(part, dir.join(name)).expect("renamed");
    };
    let content = |head: &HeadFile| {
        let file = folder.path().join("one.safetensors");
        head.write(&file).expect("written");
        std::fs::read(file).expect("a head")
    };
    let raised = |bias: f32| HeadFile {
        bias: vec![bias, 0.0],
        ..plain()
    };
    put("b.safetensors", &content(&plain()));
    // A file that cannot be used does not end the start.
    put("broken.safetensors", b"nothing");
    put("notes.txt", b"no head");
    let fixed = write(folder.path(), "fixed", &plain());
    let flags = [
        ["--head", &fixed],
        ["--head-dir", text(&dir)],
        ["--max-batch-size", "1"],
    ]
    .concat();
    let running = harness::start(&output, &flags, None).await;
    assert_eq!(names(&running).await, ["fixed", "b"]);
    let failed = "imagegpt_reload_failed{file=\"heads\"}";
    harness::until_sample(&running.worker, failed, |n| n == 1.0).await;

    let ask = async |head| {
        let call = call(head, pb::Fit::Unspecified, pb::Alpha::Unspecified);
        classify(&running, call).await.0
    };
    let before = ask("b").await;
    assert_eq!(before, ask("fixed").await);
    // Added, replaced and mended.
    put("a.safetensors", &content(&raised(2.5)));
    until_reloaded(&running, 1.0).await;
    assert_eq!(names(&running).await, ["fixed", "a", "b"]);
    assert!((ask("a").await[0] - before[0] - 2.0).abs() < 1e-5);
    put("b.safetensors", &content(&raised(1.5)));
    put("broken.safetensors", &content(&raised(9.5)));
    until_reloaded(&running, 3.0).await;
    assert!((ask("b").await[0] - before[0] - 1.0).abs() < 1e-5);
    assert!((ask("broken").await[0] - before[0] - 9.0).abs() < 1e-5);
    harness::until_sample(&running.worker, failed, |n| n == 0.0).await;

    // What cannot be used leaves the head before in service: a damaged file, a
    // layer that is not served, another width, the name of a flag's head.
    let narrow = HeadFile {
        weight: ndarray::Array2::zeros((2, 15)),
        ..plain()
    };
    let later = HeadFile {
        layer: 7,
        ..plain()
    };
    put("a.safetensors", b"damaged");
    put("b.safetensors", &content(&narrow));
    put("c.safetensors", &content(&later));
    put("fixed.safetensors", &content(&raised(5.5)));
    harness::until_sample(&running.worker, failed, |n| n == 1.0).await;
    // A good file beside them shows that they have been looked at.
    put("d.safetensors", &content(&plain()));
    until_reloaded(&running, 4.0).await;
    assert_eq!(names(&running).await, ["fixed", "a", "b", "broken", "d"]);
    assert!((ask("a").await[0] - before[0] - 2.0).abs() < 1e-5);
    assert!((ask("b").await[0] - before[0] - 1.0).abs() < 1e-5);
    assert_eq!(ask("fixed").await, before);

    // A file that is gone takes its head with it.
    std::fs::remove_file(dir.join("a.safetensors")).expect("removed");
    std::fs::remove_file(dir.join("d.safetensors")).expect("removed");
    until_reloaded(&running, 6.0).await;
    assert_eq!(names(&running).await, ["fixed", "b", "broken"]);
    let gone = call("a", pb::Fit::Unspecified, pb::Alpha::Unspecified);
    let gone = running.client.clone().classify(gone).await;
    assert_eq!(gone.expect_err("no head").code(), Code::NotFound);

    // A name that stands there and is no file is no head that is gone.
    let at = |name: &str| dir.join(name);
    for name in ["b.safetensors", "broken.safetensors"] {
        std::fs::remove_file(at(name)).expect("removed");
    }
    std::os::unix::fs::symlink("/nonexistent", at("b.safetensors")).expect("a link");
    std::fs::create_dir(at("broken.safetensors")).expect("a directory");
    put("e.safetensors", &content(&plain()));
    until_reloaded(&running, 7.0).await;
    assert_eq!(names(&running).await, ["fixed", "b", "broken", "e"]);
    assert!((ask("broken").await[0] - before[0] - 9.0).abs() < 1e-5);
    harness::until_sample(&running.worker, failed, |n| n == 1.0).await;
    std::fs::remove_file(at("b.safetensors")).expect("removed");
    std::fs::remove_dir(at("broken.safetensors")).expect("removed");
    until_reloaded(&running, 9.0).await;
    assert_eq!(names(&running).await, ["fixed", "e"]);

    // A directory that cannot be read changes nothing.
    std::fs::rename(&dir, folder.path().join("away")).expect("renamed");
    harness::until_sample(&running.worker, failed, |n| n == 1.0).await;
    assert_eq!(names(&running).await, ["fixed", "e"]);
    running.end().await;
}

/// Entries of a directory that are no heads are told once each, those that
/// stand there at start too, and the links of Kubernetes are none of them.
#[test]
fn what_is_no_head_is_told_once() {
    let folder = tempfile::tempdir().expect("a directory");
    let output = micro(folder.path());
    let dir = folder.path().join("heads");
    let at = |name: &str| dir.join(name);
    let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, at(name)).expect("a link");
    for version in ["..1", "..2"] {
        std::fs::create_dir_all(at(version)).expect("a directory");
    }
    write(&at("..1"), "mounted", &plain());
    let raised = HeadFile {
        bias: vec![1.5, 0.0],
        ..plain()
    };
    write(&at("..2"), "mounted", &raised);
    link("..1", "..data");
    link("..data/mounted.safetensors", "mounted.safetensors");
    link("/nonexistent", "nowhere.safetensors");
    link("loop.safetensors", "loop.safetensors");
    link("/dev/zero", "endless.safetensors");
    std::fs::create_dir(at("folder.safetensors")).expect("a directory");
    process::make_pipe(&at("pipe.safetensors"));
    std::fs::write(at("damaged.safetensors"), b"nothing").expect("written");
    for ignored in ["notes.txt", ".hidden.safetensors"] {
        link("/nonexistent", ignored);
    }
    let flags = ["--model", text(&output), "--head-dir", text(&dir)];
    let log = folder.path().join("log");
    let worker = process::Worker::start(
        &[&flags[..], &["--log-format", "json"]].concat(),
        std::fs::File::create(&log).expect("a log"),
    );
    let reloads = |n| {
        worker.until("a reload", |worker| {
            worker.sample("imagegpt_reloads_total{file=\"heads\"}") == Some(n)
        });
    };
    // As Kubernetes swaps a mount; and what a good file becomes.
    link("..2", "..next");
    std::fs::rename(at("..next"), at("..data")).expect("renamed");
    reloads(1.0);
    link("/nonexistent", ".next");
    std::fs::rename(at(".next"), at("mounted.safetensors")).expect("renamed");
    write(&dir, "later", &plain());
    reloads(2.0);
    std::fs::remove_file(at("later.safetensors")).expect("removed");
    reloads(3.0);
    worker.end();
    let mut told: Vec<(String, String)> = Vec::new();
    for line in std::fs::read_to_string(log).expect("a log").lines() {
        let event: serde_json::Value = serde_json::from_str(line).expect("JSON");
        let word = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        if event["level"] == "ERROR" {
            told.push((word("error"), word("message")));
        }
        assert!(
            !word("message").contains("out of service") || event["head"] == "later",
            "{line}"
        );
    }
    let (nowhere, special) = (
        "it is a symbolic link whose target does not exist",
        "it is neither a file nor a directory",
    );
    let expected = [
        ("damaged", "not a safetensors file"),
        ("endless", special),
        ("folder", "it is a directory"),
        ("loop", "it is a symbolic link that cannot be followed"),
        ("nowhere", nowhere),
        ("pipe", special),
        ("mounted", nowhere),
    ];
    assert_eq!(told.len(), expected.len(), "{told:#?}");
    for ((error, message), (name, why)) in told.iter().zip(expected) {
        let file = at(&format!("{name}.safetensors"));
        assert!(
            error.contains(text(&file)) && error.contains(why),
            "{name}: {error}"
        );
        let is_kept = message.ends_with("; the one before stays in service");
        assert_eq!(is_kept, name == "mounted", "{name}: {message}");
    }
}

#[test]
fn a_directory_of_heads_that_is_missing_ends_the_start() {
    let folder = tempfile::tempdir().expect("a directory");
    let model = micro(folder.path());
    let missing = folder.path().join("missing");
    let flags = [
        "serve",
        "--model",
        text(&model),
        "--head-dir",
        text(&missing),
    ];
    let ports = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"];
    let (code, said) = run(&[&flags[..], &ports].concat());
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("--head-dir") && said.contains("missing"),
        "{said}"
    );
}
