//! A checkpoint of random weights, small enough to be made whenever something is
//! to be run: two layers over 8 × 8 pixels of 16 colors, and no heads.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use crate::compile::{config, source};

const WIDTH: usize = 64;
const HEADS: usize = 2;
const LAYERS: usize = 2;
const SIDE: usize = 8;
const COLORS: usize = 16;
/// Weights lie within this of zero: as far as a trained model's do, so that
/// sums stay in the range of every precision.
const SPREAD: f32 = 0.1;

/// Writes it into `folder`, as Hugging Face lays models out.
///
/// # Errors
///
/// When the folder cannot be written.
pub(super) fn write(folder: &Path) -> anyhow::Result<()> {
    let config = json!({
        "model_type": "imagegpt",
        "vocab_size": COLORS + 1,
        "n_positions": SIDE * SIDE,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "notice": "random weights, to see whether a machine can run any",
    });
    // The corners of a cube in another: 16 colors that differ.
    let levels = [-0.9, 0.9, -0.3, 0.3];
    let color = |idx: usize| {
        let level = |bit: usize| levels[(idx >> bit & 1) + 2 * (idx >> 3)];
        [level(0), level(1), level(2)]
    };
    let preprocessor = json!({
        "clusters": (0..COLORS).map(color).collect::<Vec<_>>(),
        "size": SIDE,
        "resample": 2,
        "do_resize": true,
        "do_normalize": true,
    });
    let weights = weights();
    let views = weights.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
        Ok((name.as_str(), view.context("the tiny model's weights")?))
    });
    let views = views.collect::<anyhow::Result<Vec<_>>>()?;
    let files = [
        (config::FILE, config.to_string().into_bytes()),
        (source::PREPROCESSOR, preprocessor.to_string().into_bytes()),
        ("model.safetensors", safetensors::serialize(views, None)?),
    ];
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    for (name, bytes) in files {
        let path = folder.join(name);
        fs::write(&path, bytes).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

type Tensor = (String, Vec<usize>, Vec<u8>);

/// By the names that `compile::weights` looks for.
fn weights() -> Vec<Tensor> {
    let mut random = Random(1);
    let mut tensor = |name: String, shape: &[usize]| {
        let n_values: usize = shape.iter().product();
        let around = if name.contains("ln_") { 1.0 } else { 0.0 };
        let values = (0..n_values).map(|_| around + random.next() * SPREAD);
        let bytes = values.flat_map(f32::to_le_bytes).collect();
        (name, shape.to_vec(), bytes)
    };
    let mut all = vec![
        tensor("wte.weight".to_owned(), &[COLORS + 1, WIDTH]),
        tensor("wpe.weight".to_owned(), &[SIDE * SIDE, WIDTH]),
        tensor("ln_f.weight".to_owned(), &[WIDTH]),
    ];
    for layer in 0..LAYERS {
        let name = |part: &str| format!("h.{layer}.{part}");
        all.push(tensor(name("ln_1.weight"), &[WIDTH]));
        all.push(tensor(name("ln_2.weight"), &[WIDTH]));
        for (part, inputs, outputs) in [
            ("attn.c_attn", WIDTH, 3 * WIDTH),
            ("attn.c_proj", WIDTH, WIDTH),
            ("mlp.c_fc", WIDTH, 4 * WIDTH),
            ("mlp.c_proj", 4 * WIDTH, WIDTH),
        ] {
            all.push(tensor(name(&format!("{part}.weight")), &[inputs, outputs]));
            all.push(tensor(name(&format!("{part}.bias")), &[outputs]));
        }
    }
    all
}

/// A linear congruential generator (Knuth's MMIX), of which the high half is
/// taken: the same weights everywhere.
struct Random(u64);

impl Random {
    /// At least -1, below 1.
    #[expect(clippy::cast_precision_loss, reason = "24 bits fit an f32")]
    fn next(&mut self) -> f32 {
        let (a, c) = (6_364_136_223_846_793_005, 1_442_695_040_888_963_407);
        self.0 = self.0.wrapping_mul(a).wrapping_add(c);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::checkpoint::Checkpoint;
    use crate::compile::config::Architecture;
    use crate::compile::weights::Weights;

    #[test]
    fn it_is_a_checkpoint_that_compile_takes() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path()).unwrap();
        let architecture = Architecture::read(folder.path()).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let weights = Weights::new(&checkpoint, architecture);
        for idx in 0..LAYERS {
            let layer = weights.layer(idx).unwrap();
            assert!(
                layer
                    .attention_norm
                    .iter()
                    .all(|norm| (0.9..1.1).contains(norm))
            );
            assert!(layer.qkv.weight.iter().all(|weight| weight.abs() <= SPREAD));
        }
        let embedding = weights.token_embedding().unwrap();
        assert!(embedding.iter().any(|value| *value > 0.0));
        assert!(embedding.iter().any(|value| *value < 0.0));
    }
}
