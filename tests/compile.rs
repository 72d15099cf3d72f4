//! `imagegpt::compile` from a checkpoint to a directory, and all failures,
//! which must leave no directory. Needs ONNX Runtime from `make setup` or
//! `ORT_DYLIB_PATH`.
#![warn(clippy::disallowed_methods)]
#![allow(
    clippy::unwrap_used,
    reason = "a failure in a test's own work is a failed test"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use imagegpt::compile::{
    CompileError, CompileOptions, CompileProgress, CompileStep, ModelSource, Silent, compile,
    compile_cached,
};
use imagegpt::engine::onnx;
use imagegpt::kernels::attention::Kernel;
use imagegpt::kernels::layers::RowsAs;
use imagegpt::kernels::whole::has_bf16_products;
use imagegpt::model::Model;
use imagegpt::model::manifest::Manifest;
use imagegpt::model::onnx::{DataType, Dim, ModelProto, NodeProto, TensorType, ValueInfoProto};
use imagegpt::model::precision::{CompileTask, Precision, Provider};
use imagegpt::runtime::Runtime;
use ort::environment::Environment;
use prost::Message as _;
use safetensors::tensor::{Dtype, TensorView, serialize};
use tempfile::TempDir;

const WIDTH: usize = 16;
/// Positions of images of 4 x 4 pixels.
const POSITIONS: usize = 16;
const VOCABULARY: usize = 9;
const LAYERS: usize = 3;

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

/// Makes weights that look random and are the same everywhere.
fn tensors() -> Tensors {
    let mut state = 1_u32;
    let mut values = |n: usize, scale: f32| -> Vec<f32> {
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let byte = u16::try_from(state >> 16).unwrap();
                (f32::from(byte) / 32768.0 - 1.0) * scale
            })
            .collect()
    };
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize], scale: f32| {
        let values = values(shape.iter().product(), scale);
        tensors.push((name, shape.to_vec(), values));
    };
    add("transformer.wte.weight".into(), &[VOCABULARY, WIDTH], 1.0);
    add("transformer.wpe.weight".into(), &[POSITIONS, WIDTH], 1.0);
    add("transformer.ln_f.weight".into(), &[WIDTH], 1.0);
    add("lm_head.weight".into(), &[VOCABULARY - 1, WIDTH], 1.0);
    add("score.weight".into(), &[5, WIDTH], 1.0);
    for layer in 0..LAYERS {
        let mut add = |part: &str, shape: &[usize], scale| {
            add(format!("transformer.h.{layer}.{part}"), shape, scale);
        };
        add("ln_1.weight", &[WIDTH], 1.0);
        add("ln_2.weight", &[WIDTH], 1.0);
        for (part, inputs, outputs) in [
            ("attn.c_attn", WIDTH, 3 * WIDTH),
            ("attn.c_proj", WIDTH, WIDTH),
            ("mlp.c_fc", WIDTH, 4 * WIDTH),
            ("mlp.c_proj", 4 * WIDTH, WIDTH),
        ] {
            add(&format!("{part}.weight"), &[inputs, outputs], 0.3);
            // Layer 1 has no biases to speak of, as in published weights.
            let scale = if layer == 1 { 0.0 } else { 0.1 };
            add(&format!("{part}.bias"), &[outputs], scale);
        }
    }
    tensors
}

fn write(folder: &Path, tensors: &Tensors) {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, _, values)| {
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect()
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    fs::write(
        folder.join("model.safetensors"),
        serialize(views, None).unwrap(),
    )
    .unwrap();
    let config = format!(
        r#"{{"model_type": "imagegpt", "n_embd": {WIDTH}, "n_head": 2, "n_layer": {LAYERS},
            "n_positions": {POSITIONS}, "vocab_size": {VOCABULARY}}}"#
    );
    fs::write(folder.join("config.json"), config).unwrap();
    let colors = ["[0, 0.5, -1]"; VOCABULARY - 1].join(",");
    let preprocessor = format!(r#"{{"size": 4, "clusters": [{colors}]}}"#);
    fs::write(folder.join("preprocessor_config.json"), preprocessor).unwrap();
}

fn checkpoint(change: impl FnOnce(&mut Tensors)) -> TempDir {
    let folder = TempDir::new().unwrap();
    let mut tensors = tensors();
    change(&mut tensors);
    write(folder.path(), &tensors);
    folder
}

fn runtime() -> Runtime {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    let environment = ENVIRONMENT.get_or_init(|| {
        let given = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from);
        onnx::environment(&onnx::find_library(given.as_deref())).unwrap()
    });
    Runtime {
        n_threads: 1,
        ..Runtime::new(environment.clone(), Provider::Cpu).unwrap()
    }
}

fn run(source: &Path, output: &Path, options: &CompileOptions) -> Result<Manifest, CompileError> {
    let source = ModelSource::Folder(source.to_owned());
    compile(&source, output, options, &runtime(), &mut Silent)
}

/// Checks the error of a compilation, and that the output and all traces of it
/// are absent.
#[track_caller]
fn refused(source: &Path, options: &CompileOptions, word: &str) {
    let parent = TempDir::new().unwrap();
    let result = run(source, &parent.path().join("out"), options);
    let error = result.unwrap_err().to_string();
    assert!(error.contains(word), "{error}");
    assert!(!error.contains('\n'), "{error}");
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
}

#[test]
fn every_task_is_compiled_and_described() {
    let source = checkpoint(|_| {});
    let parent = TempDir::new().unwrap();
    // What a killed compilation left; process 4 million does not exist.
    let abandoned = parent.path().join(".out.partial-4194304-0");
    fs::create_dir(&abandoned).unwrap();
    let output = parent.path().join("out");
    let result = run(source.path(), &output, &CompileOptions::default());
    let manifest = result.unwrap();
    assert_eq!(manifest, Manifest::read(&output).unwrap());
    assert!(!abandoned.exists());
    assert_eq!(manifest.tasks, CompileTask::ALL);
    assert_eq!(manifest.graphs.len(), 6);
    assert_eq!(manifest.feature_layer, 2);
    assert_eq!(manifest.verification.n_positions, POSITIONS);
    assert_eq!(manifest.graphs["embed-none"].errors.len(), 3);
    assert_eq!(manifest.n_classes, Some(5));
    for graph in manifest.graphs.values() {
        assert!(graph.cosine > 0.999_999);
    }
    let ran = &manifest.graphs["hidden"].operators["CPUExecutionProvider"];
    assert_eq!(ran["ImageLayers"], 1);

    fs::remove_file(output.join("hidden.onnx")).unwrap();
    let error = Manifest::read(&output).unwrap_err().to_string();
    assert!(error.contains("hidden.onnx"), "{error}");
}

/// bfloat16 on a CPU is fast only with instructions for it.
#[test]
fn bf16_is_compiled_where_the_cpu_has_it() {
    let parent = TempDir::new().unwrap();
    let source = checkpoint(|_| {});
    let options = CompileOptions {
        precision: Precision::Bf16,
        ..CompileOptions::default()
    };
    let output = parent.path().join("out");
    let compiled = run(source.path(), &output, &options);
    if has_bf16_products() {
        let manifest = compiled.unwrap();
        assert!(manifest.graphs.values().all(|graph| graph.cosine > 0.9999));
        return;
    }
    let error = compiled.unwrap_err().to_string();
    assert!(error.contains("AVX512_BF16 or AMX-BF16"), "{error}");
    assert!(error.contains("--precision int8 or fp32"), "{error}");
    assert!(!output.exists());
}

#[test]
fn bf16_on_a_cpu_is_not_portable() {
    let parent = TempDir::new().unwrap();
    let source = checkpoint(|_| {});
    let options = CompileOptions {
        precision: Precision::Bf16,
        ..CompileOptions::default()
    };
    let portable = Runtime {
        operators: None,
        ..runtime()
    };
    let source = ModelSource::Folder(source.path().to_owned());
    let output = parent.path().join("out");
    let compiled = compile(&source, &output, &options, &portable, &mut Silent);
    let error = compiled.unwrap_err().to_string();
    assert!(error.contains("bf16 on the CPU needs"), "{error}");
}

/// With int8 the key/value cache may be rounded too, except in a portable
/// graph, which has none of the worker's own operators.
#[test]
fn the_cache_is_kept_as_the_precision_allows() {
    let source = checkpoint(|_| {});
    let source = ModelSource::Folder(source.path().to_owned());
    let ours = runtime();
    let portable = Runtime {
        operators: None,
        ..ours.clone()
    };
    for (precision, runtime, expected) in [
        (Precision::Int8, &ours, ("Layers", 1)),
        (Precision::Int8, &portable, ("GroupQueryAttention", LAYERS)),
        (Precision::Fp32, &ours, ("Layers", 1)),
    ] {
        let parent = TempDir::new().unwrap();
        let options = CompileOptions {
            precision,
            tasks: Some(BTreeSet::from([CompileTask::Generate])),
            ..CompileOptions::default()
        };
        let output = parent.path().join("out");
        let manifest = compile(&source, &output, &options, runtime, &mut Silent).unwrap();
        let ran = &manifest.graphs["generate"].operators["CPUExecutionProvider"];
        let attention: Vec<_> = ran
            .iter()
            .filter(|(operator, _)| operator.ends_with("Attention") || *operator == "Layers")
            .map(|(operator, n)| (operator.as_str(), *n))
            .collect();
        assert_eq!(attention, [expected], "{precision:?}");
    }
}

/// The same model with an activation ten thousand times smaller and its weights
/// as many times larger: the other weights of their columns are left with too
/// few of 24 bits.
#[test]
fn steps_that_24_bits_are_too_few_for_are_onnx_runtimes() {
    const FACTOR: f32 = 1e4;
    let source = checkpoint(|tensors| {
        for (name, _, values) in tensors {
            if name.ends_with("ln_2.weight") {
                values[0] /= FACTOR;
            } else if name.ends_with("mlp.c_fc.weight") {
                values[..4 * WIDTH].iter_mut().for_each(|x| *x *= FACTOR);
            }
        }
    });
    let parent = TempDir::new().unwrap();
    let output = parent.path().join("out");
    let manifest = run(source.path(), &output, &CompileOptions::default()).unwrap();
    let facts = &manifest.graphs["generate"];
    let ran = &facts.operators["CPUExecutionProvider"];
    assert!(ran.contains_key("GroupQueryAttention"), "{ran:?}");
    assert!(!ran.contains_key("Layers"), "{ran:?}");
    let tolerance = Precision::Fp32.tolerance();
    assert!(facts.errors.iter().all(|error| *error <= tolerance));
}

/// An activation a hundred million times larger, with weights of zero: the
/// other activations of its row round to zero on a CPU that rounds rows to 24
/// bits.
#[test]
fn steps_whose_rows_cannot_be_rounded_are_refused() {
    let source = checkpoint(|tensors| {
        for (name, _, values) in tensors {
            if name.ends_with("ln_2.weight") {
                values[0] *= 1e8;
            } else if name.ends_with("mlp.c_fc.weight") {
                values[..4 * WIDTH].fill(0.0);
            }
        }
    });
    let parent = TempDir::new().unwrap();
    let output = parent.path().join("out");
    let options = CompileOptions {
        precision: Precision::Int8,
        tasks: Some(BTreeSet::from([CompileTask::Generate])),
        ..CompileOptions::default()
    };
    let outcome = run(source.path(), &output, &options).map_err(|error| error.to_string());
    let kernel = Kernel::fastest(imagegpt::kernels::attention::AttentionPrecision::F32);
    match RowsAs::fastest::<i8>(kernel, 4 * WIDTH) {
        RowsAs::Floats => {
            let errors = &outcome.unwrap().graphs["generate"].errors;
            let tolerance = Precision::Int8.tolerance();
            assert!(errors.iter().all(|error| *error <= tolerance), "{errors:?}");
        }
        RowsAs::Digits => {
            let error = outcome.unwrap_err();
            assert!(error.contains("generate"), "{error}");
        }
    }
}

/// A bias and the activation after it, which ONNX Runtime fuses into one
/// operator.
#[test]
fn gelu_after_a_bias_counts_as_gelu() {
    let source = checkpoint(|_| {});
    let config = source.path().join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    let gelu = r#"{"activation_function": "gelu", "#;
    fs::write(&config, text.replacen('{', gelu, 1)).unwrap();
    let source = ModelSource::Folder(source.path().to_owned());
    let portable = Runtime {
        operators: None,
        ..runtime()
    };
    let options = CompileOptions {
        precision: Precision::Int8,
        tasks: Some(BTreeSet::from([CompileTask::Generate])),
        ..CompileOptions::default()
    };
    let output = TempDir::new().unwrap();
    let output = output.path().join("out");
    let manifest = compile(&source, &output, &options, &portable, &mut Silent).unwrap();
    let ran = &manifest.graphs["generate"].operators["CPUExecutionProvider"];
    assert!(ran.contains_key("BiasGelu"), "{ran:?}");
}

/// Graphs for a GPU: tokens of four bytes, attention as one operator per layer,
/// and for embeddings only the means as output.
#[test]
fn graphs_for_a_gpu_take_and_give_little() {
    let source = checkpoint(|_| {});
    for precision in [Precision::Fp32, Precision::Fp16] {
        let parent = TempDir::new().unwrap();
        let output = parent.path().join("out");
        let options = CompileOptions {
            precision,
            provider: Provider::Cuda,
            ..CompileOptions::default()
        };
        let manifest = run(source.path(), &output, &options).unwrap();
        assert_eq!(manifest.provider, Provider::Cuda);
        // ONNX Runtime keeps keys and values on CUDA in 16 bits alone.
        let generates = manifest.tasks.contains(&CompileTask::Generate);
        assert_eq!(generates, precision != Precision::Fp32);
        for (name, facts) in &manifest.graphs {
            let bytes = fs::read(output.join(&facts.file)).unwrap();
            let graph = ModelProto::decode(&*bytes).unwrap().graph.unwrap();
            let fused = graph.node.iter();
            let fused = fused.filter(|node| node.op_type.ends_with("Attention"));
            assert_eq!(fused.count(), facts.n_layers, "{name}");
            let tokens = ["input_ids", "targets", "position_ids"];
            for input in &graph.input {
                if tokens.contains(&input.name.as_str()) {
                    let element = tensor(input).elem_type();
                    assert_eq!(element, DataType::Int32, "{name}: {}", input.name);
                }
            }
            if name.starts_with("embed-") {
                let means = [Dim::Size(manifest.feature_layer + 1), Dim::Size(WIDTH)];
                let dims = [&[Dim::Name("batch")], &means[..]].concat();
                let expected = ValueInfoProto::tensor("features", DataType::Float, &dims);
                assert_eq!(graph.output, [expected], "{name}");
            }
        }
    }
    let options = CompileOptions {
        provider: Provider::Cuda,
        tasks: Some([CompileTask::Generate].into()),
        ..CompileOptions::default()
    };
    let output = TempDir::new().unwrap();
    let error = run(source.path(), &output.path().join("out"), &options).unwrap_err();
    assert!(error.to_string().contains("bf16 or fp16"), "{error}");
}

/// The promise of `--portable` for graphs for a GPU.
#[test]
fn graphs_for_a_gpu_do_without_the_workers_operators() {
    let source = checkpoint(|_| {});
    let portable = Runtime {
        operators: None,
        ..runtime()
    };
    for precision in [Precision::Fp32, Precision::Fp16] {
        let options = CompileOptions {
            precision,
            provider: Provider::Cuda,
            ..CompileOptions::default()
        };
        let parent = TempDir::new().unwrap();
        let output = parent.path().join("out");
        let from = ModelSource::Folder(source.path().to_owned());
        let manifest = compile(&from, &output, &options, &portable, &mut Silent).unwrap();
        assert!(!manifest.graphs.is_empty());
        for facts in manifest.graphs.values() {
            let bytes = fs::read(output.join(&facts.file)).unwrap();
            let graph = ModelProto::decode(&*bytes).unwrap().graph.unwrap();
            let ours = |node: &&NodeProto| !["", "com.microsoft"].contains(&node.domain.as_str());
            assert_eq!(graph.node.iter().find(ours), None);
        }
    }
}

fn tensor(value: &ValueInfoProto) -> &TensorType {
    value.r#type.as_ref().unwrap().tensor_type.as_ref().unwrap()
}

#[test]
fn every_feature_layer_can_end_the_graph() {
    let source = checkpoint(|_| {});
    for layer in 0..=LAYERS {
        for precision in [Precision::Fp32, Precision::Int8] {
            let parent = TempDir::new().unwrap();
            let options = CompileOptions {
                precision,
                feature_layer: Some(layer),
                tasks: Some(BTreeSet::from([CompileTask::Embed])),
                ..CompileOptions::default()
            };
            let result = run(source.path(), &parent.path().join("out"), &options);
            let manifest = result.unwrap();
            assert_eq!(manifest.graphs["embed-none"].n_layers, layer);
            assert_eq!(
                manifest.graphs["embed-pre_attn_rms"].errors.len(),
                layer + 1
            );
        }
    }
}

#[test]
fn a_backbone_alone_has_fewer_tasks() {
    let source = checkpoint(|tensors| {
        tensors.retain(|(name, _, _)| name.starts_with("transformer."));
        for (name, _, _) in tensors {
            *name = name["transformer.".len()..].to_owned();
        }
    });
    let parent = TempDir::new().unwrap();
    let options = CompileOptions::default();
    let result = run(source.path(), &parent.path().join("out"), &options);
    assert_eq!(
        result.unwrap().tasks,
        [CompileTask::Embed, CompileTask::Hidden]
    );
    let options = CompileOptions {
        tasks: Some(BTreeSet::from([CompileTask::Score])),
        ..CompileOptions::default()
    };
    refused(source.path(), &options, "lm_head.weight");
}

#[test]
fn bad_weights_leave_nothing() {
    let options = CompileOptions::default();
    let name = "transformer.h.1.mlp.c_fc.weight";
    let source = checkpoint(|tensors| tensors.retain(|tensor| tensor.0 != name));
    refused(
        source.path(),
        &options,
        "has no tensor transformer.h.1.mlp.c_fc.weight",
    );
    let source = checkpoint(|tensors| {
        let tensor = tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap();
        tensor.1.reverse();
    });
    refused(source.path(), &options, "of shape [64, 16]");
    let source = checkpoint(|tensors| tensors[0].2[3] = f32::NAN);
    refused(source.path(), &options, "not finite");
    let source = checkpoint(|_| {});
    let weights = source.path().join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    refused(source.path(), &options, "truncated");
    fs::remove_file(&weights).unwrap();
    refused(source.path(), &options, "has no weights");
}

#[test]
fn graphs_that_are_off_leave_nothing() {
    // One huge weight leaves its column few of the 8-bit steps.
    let source = checkpoint(|tensors| {
        let projections = tensors
            .iter_mut()
            .filter(|tensor| tensor.0.contains("c_proj.weight"));
        for (_, shape, values) in projections {
            values[..shape[1]].fill(40.0);
        }
    });
    let options = CompileOptions {
        precision: Precision::Int8,
        ..CompileOptions::default()
    };
    refused(
        source.path(),
        &options,
        "the tolerance of int8 is 5e-2; nothing was written",
    );
}

#[test]
fn random_models_are_the_same_every_time() {
    let folder = TempDir::new().unwrap();
    let source = ModelSource::parse("random:tiny", None);
    let compiled = |name: &str| {
        let output = folder.path().join(name);
        let manifest = compile(
            &source,
            &output,
            &CompileOptions::default(),
            &runtime(),
            &mut Silent,
        );
        let weights = fs::read(output.join("weights.bin")).unwrap();
        (manifest.unwrap(), weights)
    };
    let (one, one_weights) = compiled("one");
    let (other, other_weights) = compiled("other");
    assert_eq!(one.source.name, "random:tiny");
    assert_eq!(one.source.sha256, other.source.sha256);
    assert_eq!(one_weights, other_weights);
    let graphs: Vec<&str> = one.graphs.keys().map(String::as_str).collect();
    assert_eq!(
        graphs,
        [
            "embed-none",
            "embed-pre_attn_rms",
            "generate",
            "hidden",
            "score"
        ]
    );
    let kept = fs::read_to_string(folder.path().join("one/config.json")).unwrap();
    assert!(kept.contains("random weights"), "{kept}");
}

#[test]
fn unknown_random_models_are_refused() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("output");
    let source = ModelSource::parse("random:xyz", None);
    let error = compile(
        &source,
        &output,
        &CompileOptions::default(),
        &runtime(),
        &mut Silent,
    );
    let error = error.unwrap_err().to_string();
    assert!(error.contains("random:xyz") && error.contains("random:small"));
    assert!(!output.exists());
}

#[test]
fn recipes_of_other_generators_are_refused() {
    let folder = TempDir::new().unwrap();
    let preprocessor = r#"{"size": 32, "clusters": [[0, 0, 0]]}"#;
    let path = folder.path().join("preprocessor_config.json");
    fs::write(path, preprocessor).unwrap();
    fs::write(
        folder.path().join("config.json"),
        r#"{"model_type": "imagegpt"}"#,
    )
    .unwrap();
    let recipe = |text: &str| fs::write(folder.path().join("random_weights.json"), text).unwrap();
    let options = CompileOptions::default();
    recipe(r#"{"generator": 9, "seed": 0, "standard_deviation": 0.02}"#);
    refused(folder.path(), &options, "generator 9");
    recipe("{}");
    refused(folder.path(), &options, "not a recipe");
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let source = checkpoint(|_| {});
    let beyond = CompileOptions {
        feature_layer: Some(LAYERS + 1),
        ..CompileOptions::default()
    };
    refused(source.path(), &beyond, "beyond the model's 3 layers");
    let half = CompileOptions {
        precision: Precision::Fp16,
        ..CompileOptions::default()
    };
    refused(source.path(), &half, "compile for CUDA");
    refused(
        Path::new("/nowhere"),
        &CompileOptions::default(),
        "directory does not exist",
    );
}

#[test]
fn an_output_in_use_is_left_alone() {
    let source = checkpoint(|_| {});
    let output = TempDir::new().unwrap();
    let mine = output.path().join("mine");
    fs::write(&mine, "precious").unwrap();
    let result = run(source.path(), output.path(), &CompileOptions::default());
    assert!(
        result
            .unwrap_err()
            .to_string()
            .contains("not an empty directory")
    );
    assert_eq!(fs::read(&mine).unwrap(), b"precious");
}

#[test]
fn a_cached_folder_is_found_again() {
    let runtime = runtime();
    let source = checkpoint(|_| {});
    let source = ModelSource::Folder(source.path().to_owned());
    let cache = TempDir::new().unwrap();
    let get = |options: &CompileOptions| {
        compile_cached(&source, cache.path(), options, &runtime, &mut Silent).unwrap()
    };
    let (folder, manifest) = get(&CompileOptions::default());
    let made = fs::metadata(&folder).unwrap().created().unwrap();
    assert_eq!(get(&CompileOptions::default()), (folder.clone(), manifest));
    assert_eq!(fs::metadata(&folder).unwrap().created().unwrap(), made);
    let int8 = CompileOptions {
        precision: Precision::Int8,
        ..CompileOptions::default()
    };
    assert_ne!(get(&int8).0, folder);
}

/// Weights are read once for the cache, since those of a large model take a
/// minute.
#[test]
fn weights_are_read_once_for_the_cache() {
    #[derive(Default)]
    struct Steps(Vec<CompileStep>);
    impl CompileProgress for Steps {
        fn begin(&mut self, step: CompileStep, _total: u64) {
            self.0.push(step);
        }
        fn advance(&mut self, _units: u64) {}
    }

    let source = checkpoint(|_| {});
    let source = ModelSource::Folder(source.path().to_owned());
    let cache = TempDir::new().unwrap();
    let (runtime, options) = (runtime(), CompileOptions::default());
    let get = || {
        let mut steps = Steps::default();
        let (_, manifest) =
            compile_cached(&source, cache.path(), &options, &runtime, &mut steps).unwrap();
        (manifest.source.sha256, steps.0)
    };
    let all = [
        CompileStep::Digest,
        CompileStep::Write,
        CompileStep::Reference,
        CompileStep::Verify,
    ];
    let (sha256, steps) = get();
    assert_eq!(steps, all);
    assert_eq!(get(), (sha256.clone(), vec![CompileStep::Digest]));
    let apart = TempDir::new().unwrap().path().join("apart");
    let manifest = compile(&source, &apart, &options, &runtime, &mut Silent).unwrap();
    assert_eq!(manifest.source.sha256, sha256);
}

/// Steps that a compilation has begun.
#[derive(Default)]
struct Begun(Vec<CompileStep>);

impl CompileProgress for Begun {
    fn begin(&mut self, step: CompileStep, _total: u64) {
        self.0.push(step);
    }

    fn advance(&mut self, _units: u64) {}
}

/// Compiles a copy of the micro checkpoint, and opens the micro model's graphs,
/// both with one of their files changed, and returns the two errors without the
/// directories.
fn refusals(file: &str, content: Option<&[u8]>) -> (String, String) {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models");
    let copy = |name: &str| {
        let folder = TempDir::new().unwrap();
        for entry in fs::read_dir(data.join(name)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        // The settings are those of the checkpoint in both.
        for shared in ["config.json", "preprocessor_config.json"] {
            let from = data.join("micro-checkpoint").join(shared);
            fs::copy(from, folder.path().join(shared)).unwrap();
        }
        let path = folder.path().join(file);
        match content {
            Some(content) => fs::write(path, content).unwrap(),
            None => fs::remove_file(path).unwrap(),
        }
        folder
    };
    let published = copy("micro");
    let served = Model::open(published.path(), None).expect_err(file);
    let source = copy("micro-checkpoint");
    let output = TempDir::new().unwrap();
    let mut begun = Begun::default();
    let compiled = compile(
        &ModelSource::Folder(source.path().to_owned()),
        &output.path().join("out"),
        &CompileOptions::default(),
        &runtime(),
        &mut begun,
    );
    let compiled = compiled.expect_err(file);
    assert_eq!(begun.0, [], "{compiled}");
    let words = |error: String, folder: &TempDir| {
        error.replace(&folder.path().display().to_string(), "DIR")
    };
    (
        words(compiled.to_string(), &source),
        words(served.to_string(), &published),
    )
}

/// A model whose settings `serve` refuses is refused before it is compiled, in
/// the same words.
#[test]
fn settings_are_refused_as_serve_refuses_them() {
    let check = |file: &str, content: Option<&[u8]>, words: &str| {
        let (compiled, served) = refusals(file, content);
        assert_eq!(compiled, served);
        assert!(compiled.contains(words), "{compiled:?} lacks {words:?}");
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/micro-checkpoint");
    let (preprocessor, config) = ("preprocessor_config.json", "config.json");
    let set = |file: &str, key: &str, value: &str, words: &str| {
        let text = fs::read(folder.join(file)).unwrap();
        let mut values: serde_json::Value = serde_json::from_slice(&text).unwrap();
        values[key] = serde_json::from_str(value).unwrap();
        check(file, Some(values.to_string().as_bytes()), words);
    };
    for (key, value, words) in [
        ("do_color_quantize", "false", "do_color_quantize is false"),
        ("do_normalize", "false", "do_normalize is false"),
        ("do_resize", "false", "do_resize is false"),
        ("do_resize", "\"no\"", "expected a boolean"),
        ("resample", "3", "resample is 3"),
        ("resample", "\"bilinear\"", "expected u32"),
        ("size", "null", "size is missing"),
        ("size", "0", "size is 0"),
        ("size", "257", "size is 257"),
        ("size", r#"{"height": 8, "width": 9}"#, "size is 8 x 9"),
        ("size", r#"{"longest_edge": 8}"#, "Size"),
        ("size", "4", "n_positions is 64"),
        ("clusters", "512", "expected a sequence"),
        ("clusters", "null", "clusters is missing"),
        ("clusters", "[]", "clusters is missing"),
        ("clusters", "[[0, 0]]", "clusters[0] has 2 numbers"),
        ("clusters", "[[0, 0, 0], [0, 255, 0]]", "clusters[1] is"),
        ("clusters", "[[0, 0, 0]]", "vocab_size is 17"),
    ] {
        set(preprocessor, key, value, words);
    }
    for (key, value, words) in [
        ("model_type", "\"gpt2\"", "model_type is \"gpt2\""),
        ("model_type", "7", "expected a string"),
        ("vocab_size", "18", "vocab_size is 18"),
        ("vocab_size", "-1", "expected u64"),
        ("n_positions", "1024", "n_positions is 1024"),
        ("n_layer", "1.5", "expected u32"),
        (
            "id2label",
            r#"{"0": "a", "2": "b"}"#,
            "id2label has the key \"2\"",
        ),
        (
            "id2label",
            r#"{"0": "a", "00": "b"}"#,
            "id2label has the key",
        ),
        ("id2label", r#"["a", "b"]"#, "expected a map"),
        (
            "problem_type",
            "\"regression\"",
            "problem_type is \"regression\"",
        ),
        ("notice", "[]", "expected a string"),
    ] {
        set(config, key, value, words);
    }
    for file in [preprocessor, config] {
        let text = fs::read(folder.join(file)).unwrap();
        let marked = [b"\xef\xbb\xbf", &text[..]].concat();
        check(file, Some(&marked), "begins with a byte order mark");
        check(file, Some(&text[..text.len() / 2]), "EOF");
        check(file, Some(b"[]"), "expected struct");
        let large = [&text[..], &vec![b' '; 4 << 20]].concat();
        check(file, Some(&large), "the file is larger than");
    }
    check(preprocessor, None, "the file is missing");
}

/// Sizes that config.json leaves out have defaults, which must fit as well; and
/// labels must fit the head.
#[test]
fn weights_that_do_not_fit_the_settings_are_refused() {
    let check = |file: &str, change: &dyn Fn(&mut serde_json::Value), words: &str| {
        let source = checkpoint(|_| {});
        let path = source.path().join(file);
        let mut values = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut values);
        fs::write(&path, values.to_string()).unwrap();
        refused(source.path(), &CompileOptions::default(), words);
    };
    let config = "config.json";
    check(
        config,
        &|values| drop(values.as_object_mut().unwrap().remove("vocab_size")),
        "vocab_size is 513, but it must be 9",
    );
    check(
        config,
        &|values| drop(values.as_object_mut().unwrap().remove("n_positions")),
        "n_positions is 1024, but images of 4 x 4",
    );
    check(
        config,
        &|values| values["id2label"] = serde_json::json!({"0": "a", "1": "b"}),
        "the head has 5 classes, but config.json names 2",
    );
}
