//! The trained model in models/emoji, as in the demo: its head on pictures that
//! neither the model nor the head was trained on.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use imagegpt::compile::{CompileOptions, ModelSource, Silent, compile};
use imagegpt::engine::onnx;
use imagegpt::model::head::LinearHead;
use imagegpt::model::precision::{CompileTask, Provider};
use imagegpt::proto::pb;
use imagegpt::runtime::Runtime;

use crate::harness::{self, Running};

/// Step through the pictures by name: every third one, since without
/// optimization a picture takes a second.
const EVERY: usize = 3;
/// Number of these 15 pictures that `make demo` classifies correctly.
const RIGHT: usize = 10;
/// Number of pictures that may differ, since other processors round
/// differently.
const MARGIN: usize = 2;

async fn emoji(folder: &Path) -> Running {
    let library = onnx::find_library(None);
    let environment = onnx::environment(&library).expect("the library");
    let runtime = Runtime::new(environment, Provider::Cpu).expect("a runtime");
    let models = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models");
    let head = models.join("emoji/category.safetensors");
    let flag = format!("category={}", head.display());
    let layer = LinearHead::open(&flag.parse().expect("a flag"))
        .expect("a head")
        .content
        .layer;
    let options = CompileOptions {
        tasks: Some(BTreeSet::from([CompileTask::Embed])),
        feature_layer: Some(layer as usize),
        ..Default::default()
    };
    let source = ModelSource::Folder(models.join("emoji"));
    let output = folder.join("emoji");
    compile(&source, &output, &options, &runtime, &mut Silent).expect("compiled");
    harness::start(&output, &["--head", &flag], None).await
}

/// Returns the pictures with the names of their directories, which are the
/// classes.
fn pictures() -> Vec<(String, pb::Image)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/pictures");
    let entries = |folder: &Path| -> Vec<PathBuf> {
        let found = std::fs::read_dir(folder).expect("a folder");
        let mut paths: Vec<PathBuf> = found.map(|entry| entry.expect("an entry").path()).collect();
        paths.sort();
        paths
    };
    let classes = entries(&folder).into_iter().filter(|path| path.is_dir());
    let paths: Vec<PathBuf> = classes.flat_map(|class| entries(&class)).collect();
    paths
        .iter()
        .step_by(EVERY)
        .map(|path| {
            let class = path.parent().and_then(Path::file_name).expect("a folder");
            let bytes = std::fs::read(path).expect("a picture");
            let image = pb::Image {
                source: Some(pb::image::Source::Encoded(bytes.into())),
            };
            (class.to_string_lossy().into_owned(), image)
        })
        .collect()
}

/// Returns the directory of a class: "Food & Drink" has the directory
/// food-drink.
fn folder_of(label: &str) -> String {
    let words = label.split(|letter: char| !letter.is_alphanumeric());
    let words: Vec<String> = words
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect();
    words.join("-")
}

#[tokio::test]
async fn the_shipped_head_knows_pictures_it_has_not_seen() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut running = emoji(folder.path()).await;
    let (classes, images): (Vec<String>, Vec<pb::Image>) = pictures().into_iter().unzip();
    let mut n_right = 0;
    for (classes, images) in classes.chunks(16).zip(images.chunks(16)) {
        let request = pb::ClassifyRequest {
            images: images.to_vec(),
            preprocess: Some(pb::Preprocess {
                alpha: pb::Alpha::White.into(),
                ..Default::default()
            }),
            top_k: 1,
            head: "category".to_owned(),
            ..Default::default()
        };
        let response = running.client.classify(request).await.expect("an answer");
        let results = response.into_inner().results;
        assert_eq!(results.len(), classes.len());
        for (class, result) in classes.iter().zip(results) {
            let Some(pb::classify_result::Outcome::Classification(found)) = result.outcome else {
                panic!("no classes for a picture of {class}");
            };
            n_right += usize::from(folder_of(&found.classes[0].label) == *class);
        }
    }
    assert!(
        n_right + MARGIN >= RIGHT,
        "{n_right} of {} are right, where {RIGHT} were",
        classes.len()
    );
    running.end().await;
}
