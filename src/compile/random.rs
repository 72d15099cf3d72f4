//! Models with random weights, for measurements without a checkpoint.
//!
//! A model's speed depends on its shape only. `random:small` and its siblings
//! are the published shapes with weights that are drawn as transformers
//! initializes them. Each tensor is generated from a seed and its name whenever
//! it is read, so a model of several gigabytes needs no file and is never in
//! memory as a whole. A directory with a `random_weights.json` is such a
//! checkpoint, too.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::error::CompileError;
use super::source::{Local, PREPROCESSOR};
use crate::model::architecture;
use crate::model::architecture::Architecture;

/// Prefix of a source's name that asks for random weights.
pub(crate) const PREFIX: &str = "random:";
/// Name of the file that replaces the weights of a directory, and holds the
/// recipe by which they are drawn.
pub(crate) const FILE: &str = "random_weights.json";

/// Version of the generator; raised when the same seed gives other weights.
const GENERATOR: u32 = 1;
/// Standard deviation of the weights that transformers initializes ImageGPT
/// with.
const STANDARD_DEVIATION: f64 = 0.02;
/// Number of levels per color channel of the palette, which is a cube of
/// colors.
const COLORS_A_SIDE: u32 = 8;

/// Named shape of a model.
struct Shape {
    name: &'static str,
    n_layers: usize,
    width: usize,
    n_heads: usize,
}

/// The published shapes, and one for tests.
const SHAPES: [Shape; 4] = [
    Shape {
        name: "tiny",
        n_layers: 3,
        width: 64,
        n_heads: 4,
    },
    Shape {
        name: "small",
        n_layers: 24,
        width: 512,
        n_heads: 8,
    },
    Shape {
        name: "medium",
        n_layers: 36,
        width: 1024,
        n_heads: 8,
    },
    Shape {
        name: "large",
        n_layers: 48,
        width: 1536,
        n_heads: 16,
    },
];

/// Temporary directory that is removed when it is dropped.
#[derive(Debug, PartialEq, Eq)]
pub struct ScratchFolder(PathBuf);

impl ScratchFolder {
    /// Creates a directory with a random name, so that nobody else can have
    /// created it before and put files into it.
    ///
    /// # Errors
    ///
    /// When the directory cannot be created.
    pub fn new(purpose: &str) -> Result<Self, CompileError> {
        let name = format!("imagegpt-{purpose}-{:016x}", super::stage::random());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir(&folder).map_err(|error| CompileError::write(&folder, &error))?;
        Ok(Self(folder))
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ScratchFolder {
    fn drop(&mut self) {
        // An error cannot be reported here.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Makes the checkpoint of the shape `name`: its configuration, a palette and
/// the recipe of its weights, a few kilobytes in a temporary directory.
///
/// # Errors
///
/// When the shape is unknown, or the directory cannot be written.
pub(crate) fn fetch(name: &str) -> Result<Local, CompileError> {
    let Some(shape) = SHAPES.iter().find(|shape| shape.name == name) else {
        let known = SHAPES.map(|shape| format!("{PREFIX}{}", shape.name));
        return Err(CompileError::Options(format!(
            "there is no model {PREFIX}{name}; known models are {}",
            known.join(", ")
        )));
    };
    let scratch = ScratchFolder::new(&format!("random-{name}"))?;
    let folder = scratch.path().to_owned();
    let written = |error: &std::io::Error| CompileError::write(&folder, error);
    for (file, text) in [
        (architecture::FILE, config_json(shape)),
        (PREPROCESSOR, preprocessor_json()),
        (FILE, recipe_json()),
    ] {
        fs::write(folder.join(file), text).map_err(|error| written(&error))?;
    }
    Ok(Local {
        folder,
        revision: None,
        scratch: Some(Arc::new(scratch)),
    })
}

fn config_json(shape: &Shape) -> String {
    let config = json!({
        "notice": "random weights: only its speed means something, its answers do not",
        "model_type": "imagegpt",
        "vocab_size": COLORS_A_SIDE.pow(3) + 1,
        "n_positions": 1024,
        "n_embd": shape.width,
        "n_layer": shape.n_layers,
        "n_head": shape.n_heads,
        "activation_function": "quick_gelu",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": STANDARD_DEVIATION,
    });
    format!("{config:#}\n")
}

/// Returns the preprocessor's file: a grid of colors, and the published
/// settings.
fn preprocessor_json() -> String {
    let level = |idx: u32| f64::from(2 * idx) / f64::from(COLORS_A_SIDE - 1) - 1.0;
    let clusters: Vec<[f64; 3]> = (0..COLORS_A_SIDE.pow(3))
        .map(|token| {
            let digit = |place: u32| token / COLORS_A_SIDE.pow(place) % COLORS_A_SIDE;
            [2, 1, 0].map(|place| level(digit(place)))
        })
        .collect();
    let preprocessor = json!({
        "clusters": clusters,
        "do_normalize": true,
        "do_resize": true,
        "feature_extractor_type": "ImageGPTFeatureExtractor",
        "resample": 2,
        "size": 32,
    });
    format!("{preprocessor}\n")
}

fn recipe_json() -> String {
    let recipe = json!(Recipe {
        generator: GENERATOR,
        seed: 0,
        standard_deviation: STANDARD_DEVIATION,
    });
    format!("{recipe:#}\n")
}

/// Content of `random_weights.json`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    generator: u32,
    seed: u64,
    standard_deviation: f64,
}

/// Content of a tensor.
#[derive(Debug, Clone, Copy)]
enum Fill {
    Zeros,
    Ones,
    Normal { standard_deviation: f64 },
}

/// Tensors of a checkpoint whose weights are drawn by a recipe.
#[derive(Debug)]
pub(super) struct RandomTensors {
    seed: u64,
    tensors: BTreeMap<String, (Vec<usize>, Fill)>,
}

impl RandomTensors {
    /// Reads the recipe at `path`, and the shapes from `config.json` beside it.
    pub(super) fn open(folder: &Path, path: &Path) -> Result<Self, CompileError> {
        let text = crate::model::architecture::read(path)?;
        let recipe: Recipe = serde_json::from_slice(&text).map_err(|error| {
            CompileError::weights(path, format!("is not a recipe of weights: {error}"))
        })?;
        if recipe.generator != GENERATOR {
            return Err(CompileError::weights(
                path,
                format!(
                    "is for generator {}; this version has generator {GENERATOR}",
                    recipe.generator
                ),
            ));
        }
        let architecture = Architecture::read(folder)?;
        Ok(Self {
            seed: recipe.seed,
            tensors: tensors(&architecture, recipe.standard_deviation),
        })
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|(shape, _)| shape.as_slice())
    }

    /// Draws the numbers of the tensor `name`; none if there is no such tensor.
    pub(super) fn read(&self, name: &str) -> Vec<f32> {
        let Some((shape, fill)) = self.tensors.get(name) else {
            return Vec::new();
        };
        let n_values = shape.iter().product();
        match fill {
            Fill::Zeros => vec![0.0; n_values],
            Fill::Ones => vec![1.0; n_values],
            Fill::Normal { standard_deviation } => {
                let key = Sha256::digest(format!("{GENERATOR} {} {name}", self.seed)).into();
                let mut values = vec![0.0; n_values];
                draw(key, *standard_deviation, &mut values);
                values
            }
        }
    }
}

/// Returns the shape and content of each tensor, as transformers initializes
/// them: weights that add to the residual stream have a standard deviation that
/// falls with the number of layers.
fn tensors(
    architecture: &Architecture,
    standard_deviation: f64,
) -> BTreeMap<String, (Vec<usize>, Fill)> {
    let &Architecture {
        n_layers,
        width,
        inner_width,
        n_positions,
        vocabulary,
        ..
    } = architecture;
    let normal = Fill::Normal { standard_deviation };
    #[expect(clippy::cast_precision_loss, reason = "layers are few")]
    let narrow = Fill::Normal {
        standard_deviation: standard_deviation / (2.0 * n_layers as f64).sqrt(),
    };
    let mut tensors = BTreeMap::new();
    let mut add = |name: String, shape: &[usize], fill| {
        tensors.insert(name, (shape.to_vec(), fill));
    };
    add(
        "transformer.wte.weight".to_owned(),
        &[vocabulary, width],
        normal,
    );
    add(
        "transformer.wpe.weight".to_owned(),
        &[n_positions, width],
        normal,
    );
    add("transformer.ln_f.weight".to_owned(), &[width], Fill::Ones);
    add(
        "lm_head.weight".to_owned(),
        &[vocabulary - 1, width],
        normal,
    );
    for layer in 0..n_layers {
        let mut add = |part: &str, shape: &[usize], fill| {
            add(format!("transformer.h.{layer}.{part}"), shape, fill);
        };
        add("ln_1.weight", &[width], Fill::Ones);
        add("ln_2.weight", &[width], Fill::Ones);
        for (part, inputs, outputs, fill) in [
            ("attn.c_attn", width, 3 * width, normal),
            ("attn.c_proj", width, width, narrow),
            ("mlp.c_fc", width, inner_width, normal),
            ("mlp.c_proj", inner_width, width, narrow),
        ] {
            add(&format!("{part}.weight"), &[inputs, outputs], fill);
            add(&format!("{part}.bias"), &[outputs], Fill::Zeros);
        }
    }
    tensors
}

/// Number of values that are drawn from one stream of the generator.
const STREAM: usize = 1 << 16;

/// Fills `values` from the generator with the seed `key`, on all cores; the
/// numbers do not depend on the number of cores.
fn draw(key: [u8; 32], standard_deviation: f64, values: &mut [f32]) {
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let n_streams = values.len().div_ceil(STREAM);
    let share = n_streams.div_ceil(n_threads).max(1);
    std::thread::scope(|scope| {
        for (idx, values) in values.chunks_mut(share * STREAM).enumerate() {
            scope.spawn(move || {
                for (stream, values) in (idx * share..).zip(values.chunks_mut(STREAM)) {
                    let mut random = ChaCha8Rng::from_seed(key);
                    random.set_stream(stream as u64);
                    for value in values {
                        *value = normal(&mut random, standard_deviation);
                    }
                }
            });
        }
    });
}

/// Number of uniform values whose sum approximates a normal value.
const N_UNIFORMS: u32 = 12;

/// Draws a nearly normal value as the sum of twelve uniform 16-bit values,
/// which has the standard deviation 1 before it is scaled. Unlike logarithms
/// and cosines, the sum is the same to the bit on every machine.
fn normal(random: &mut ChaCha8Rng, standard_deviation: f64) -> f32 {
    let mut sum = 0_u32;
    for _ in 0..N_UNIFORMS / 4 {
        let bits = random.next_u64();
        for part in 0..4 {
            sum += ((bits >> (16 * part)) & 0xffff) as u32;
        }
    }
    let mean = f64::from(N_UNIFORMS * u32::from(u16::MAX)) / 2.0;
    let unit = (f64::from(sum) - mean) / 65536.0;
    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
    let value = (unit * standard_deviation) as f32;
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_nearly_normal_and_always_the_same() {
        let mut values = vec![0.0; 3 * STREAM + 7];
        draw([7; 32], 0.02, &mut values);
        let mut again = vec![0.0; values.len()];
        draw([7; 32], 0.02, &mut again);
        assert_eq!(values, again);
        // The second stream is another one.
        assert_ne!(values[..8], values[STREAM..STREAM + 8]);
        let n = f64::from(u32::try_from(values.len()).unwrap());
        let mean = |power: i32| {
            let powers = values.iter().map(|&value| f64::from(value).powi(power));
            powers.sum::<f64>() / n
        };
        assert!(mean(1).abs() < 2e-4, "{}", mean(1));
        assert!((mean(2).sqrt() / 0.02 - 1.0).abs() < 0.01);
        // A normal has 3, twelve uniforms have 2.9.
        let kurtosis = mean(4) / mean(2).powi(2);
        assert!((2.8..3.1).contains(&kurtosis), "{kurtosis}");
        assert_eq!(values[..2], FIRST);
    }

    /// First values, pinned so that a seed gives the same weights in every
    /// version and on every machine; other values need another `GENERATOR`.
    const FIRST: [f32; 2] = [0.002_355_346_7, 0.003_276_062];

    #[test]
    fn shapes_are_the_published_ones() {
        let parameters = |name: &str| {
            let local = fetch(name).unwrap();
            let architecture = Architecture::read(&local.folder).unwrap();
            tensors(&architecture, 0.02)
                .iter()
                .filter(|(name, _)| *name != "lm_head.weight")
                .map(|(_, (shape, _))| shape.iter().product::<usize>())
                .sum::<usize>()
        };
        assert_eq!(parameters("small"), 76_420_096);
        assert_eq!(parameters("medium"), 454_965_248);
        assert_eq!(parameters("large"), 1_362_127_872);
    }

    #[test]
    fn a_scratch_folder_goes_with_its_last_user() {
        let local = fetch("tiny").unwrap();
        let (folder, other) = (local.folder.clone(), local.clone());
        drop(local);
        assert!(folder.join(FILE).is_file());
        drop(other);
        assert!(!folder.exists());
    }

    #[test]
    fn other_shapes_are_refused() {
        let error = fetch("huge").unwrap_err().to_string();
        assert!(error.contains("random:huge") && error.contains("random:tiny"));
    }
}
