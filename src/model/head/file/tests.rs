use ndarray::array;

use super::*;

/// Makes a head of 2 classes over 3 numbers that says everything.
fn whole() -> HeadFile {
    HeadFile {
        labels: ["cat", "dog \"Rex\"\u{e9}"].map(String::from).into(),
        activation: ClassActivation::Sigmoid,
        layer: 4,
        norm: Norm::None,
        context: Context::SosShifted,
        fit: Some(Fit::CenterCrop),
        alpha: Some(Alpha::White),
        weights_digest: Some(format!("sha256:{}", "0f".repeat(32))),
        figures: BTreeMap::from([
            ("examples".to_owned(), Number::from(379)),
            (
                "test_accuracy".to_owned(),
                Number::from_f64(0.1 + 0.2).unwrap(),
            ),
        ]),
        tool_version: Some("0.1.0".to_owned()),
        weight: array![[1.0, 0.0, 2.0], [-0.0, f32::MIN_POSITIVE, 0.1]],
        bias: vec![0.25, -0.25],
    }
}

/// Reads a file as other programs write it, changed by `change`.
fn read(
    change: impl FnOnce(&mut HashMap<String, String>, &mut Vec<usize>),
) -> Result<HeadFile, String> {
    let mut metadata: HashMap<String, String> = [
        ("labels", "[\"cat\", \"dog\"]"),
        ("layer", "4"),
        ("norm", "NONE"),
        ("context", "SOS_SHIFTED"),
        ("format", "pt"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    let mut shape = vec![2, 3];
    change(&mut metadata, &mut shape);
    let bytes =
        |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
    let weight = bytes(&[1.0, 0.0, 2.0, 0.0, -1.0, 0.5]);
    let bias = bytes(&[0.25, -0.25]);
    let tensors = [
        (
            "weight",
            TensorView::new(Dtype::F32, shape, &weight).unwrap(),
        ),
        ("bias", TensorView::new(Dtype::F32, vec![2], &bias).unwrap()),
    ];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("head.safetensors");
    let bytes = safetensors::serialize(tensors, Some(metadata)).unwrap();
    std::fs::write(&file, bytes).unwrap();
    HeadFile::read(&file)
}

#[test]
fn a_file_without_the_optional_keys_is_a_head() {
    let head = read(|_, _| {}).unwrap();
    let expected = HeadFile {
        labels: ["cat", "dog"].map(String::from).into(),
        activation: ClassActivation::Softmax,
        fit: None,
        alpha: None,
        weights_digest: None,
        figures: BTreeMap::new(),
        tool_version: None,
        weight: array![[1.0, 0.0, 2.0], [0.0, -1.0, 0.5]],
        ..whole()
    };
    assert_eq!(head, expected);
    assert_eq!(head.width(), 3);
}

#[test]
fn what_is_written_is_read_and_always_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("head.safetensors");
    std::fs::write(&file, "an older head").unwrap();
    let bare = HeadFile {
        activation: ClassActivation::Softmax,
        fit: None,
        alpha: None,
        weights_digest: None,
        figures: BTreeMap::new(),
        tool_version: None,
        ..whole()
    };
    for head in [whole(), bare] {
        head.write(&file).unwrap();
        assert_eq!(HeadFile::read(&file).unwrap(), head);
        let first = std::fs::read(&file).unwrap();
        // Other bytes in memory, but the same numbers.
        let turned = HeadFile {
            weight: head
                .weight
                .t()
                .as_standard_layout()
                .reversed_axes()
                .to_owned(),
            ..head
        };
        turned.write(&file).unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), first);
    }
    let names = std::fs::read_dir(folder.path()).unwrap();
    assert_eq!(names.count(), 1, "no temporary file is left");
}

#[test]
fn a_head_that_cannot_be_read_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("head.safetensors");
    let check = |head: HeadFile, words: &str| {
        let error = head.write(&file).unwrap_err();
        assert!(error.contains(words), "{error}");
        assert!(!file.exists());
    };
    let with = |change: &dyn Fn(&mut HeadFile)| {
        let mut head = whole();
        change(&mut head);
        head
    };
    check(with(&|head| drop(head.labels.pop())), "labels has 1 names");
    check(with(&|head| head.bias.push(0.0)), "bias has the shape [3]");
    check(with(&|head| head.bias[1] = f32::NAN), "is not finite");
    check(
        with(&|head| head.weights_digest = Some("sha256:0F".to_owned())),
        "weights_digest is \"sha256:0F\"",
    );
    check(
        with(&|head| head.labels[0] = "x".repeat(5 << 20)),
        "the limit is 4194304; use shorter names or fewer classes",
    );
    let large = with(&|head| head.weight = Array2::zeros((2, 8 << 20)));
    check(large, "the limit of a head is 67108864; use fewer classes");
    let nowhere = folder.path().join("gone/head.safetensors");
    let error = whole().write(&nowhere).unwrap_err();
    assert!(error.contains("the file cannot be written"), "{error}");
}

#[test]
fn what_is_not_a_head_is_named() {
    let check = |key: &str, value: &str, words: &str| {
        let error = read(|metadata, _| {
            metadata.insert(key.to_owned(), value.to_owned());
        })
        .unwrap_err();
        assert!(error.contains(words), "{error}");
        assert!(error.len() < 400, "{error}");
    };
    check("labels", "[\"cat\"]", "1 names; weight has 2 classes");
    check("labels", "cat", "labels are not a JSON array");
    check("layer", "last", "layer is \"last\"");
    check("layer", &"9".repeat(5000), "it must be a whole number");
    check("norm", "L2", "norm is \"L2\"");
    check(
        "context",
        "",
        "context is \"\"; it must be RAW or SOS_SHIFTED",
    );
    check(
        "problem_type",
        "regression",
        "problem_type is \"regression\"",
    );
    check("problem_type", &"x".repeat(5000), "problem_type is");
    check(
        "fit",
        "squash",
        "fit is \"squash\"; it must be SQUASH or CENTER_CROP",
    );
    check("alpha", &"x".repeat(5000), "it must be DROP or WHITE");
    for digest in ["", "0f", "sha256:", &format!("sha256:{}", "g".repeat(64))] {
        check(
            "weights_digest",
            digest,
            "64 hexadecimal digits in lower case",
        );
    }
    check("figures", "[1]", "figures are not a JSON object of numbers");
    check("figures", "{\"a\": \"b\"}", "figures are not a JSON object");
    check("figures", "{\"a\": 1e999}", "figures are not a JSON object");
    check(
        "figures",
        &" ".repeat(20_000),
        "figures has 20000 bytes; the limit is 16384",
    );
    check(
        "tool_version",
        &"1".repeat(300),
        "tool_version has 300 bytes; the limit is 256",
    );
    let error = read(|metadata, _| drop(metadata.remove("norm"))).unwrap_err();
    assert_eq!(error, "the metadata has no norm");
    let error = read(|_, shape| *shape = vec![3, 2]).unwrap_err();
    assert!(error.contains("bias has the shape [2]"), "{error}");
}
