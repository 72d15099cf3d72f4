//! Settings of a model: the palette, the labels and what belongs to them, from
//! `preprocessor_config.json` and `config.json`.
//!
//! A model is compiled and served from the same settings, so both read them
//! here, and refuse the same ones in the same words.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::files::{Sha256Digest, open};
use super::{ModelError, architecture};
use crate::excerpt::Excerpt;
use crate::files;

/// Name of the file of the preprocessor's settings and palette.
pub(crate) const PREPROCESSOR: &str = "preprocessor_config.json";
/// Pillow's number for its bilinear filter, the only filter that is
/// implemented.
const BILINEAR: u32 = 2;
/// Largest side of an image in pixels; attention over more than 256 x 256
/// positions no longer fits the memory of a machine.
const SIDE_MAX: u32 = 256;
/// Largest size of a configuration file, in bytes; a larger file is something
/// else. A byte takes up to 16 bytes of memory once it is parsed.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

#[derive(Deserialize)]
struct PreprocessorConfig {
    clusters: Option<Vec<Vec<f64>>>,
    size: Option<Size>,
    resample: Option<u32>,
    do_resize: Option<bool>,
    do_normalize: Option<bool>,
    do_color_quantize: Option<bool>,
}

/// Image size: `32` in old files, `{"height": 32, "width": 32}` in new files.
#[derive(Deserialize)]
#[serde(untagged)]
enum Size {
    Side(u32),
    Edges { height: u32, width: u32 },
    Shortest { shortest_edge: u32 },
}

#[derive(Deserialize, Default)]
struct Config {
    model_type: Option<String>,
    n_positions: Option<u64>,
    vocab_size: Option<u64>,
    n_layer: Option<u32>,
    id2label: Option<BTreeMap<String, String>>,
    problem_type: Option<String>,
    notice: Option<String>,
}

/// Function that turns logits into scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClassActivation {
    /// Softmax over all classes.
    Softmax,
    /// Sigmoid of each class by itself.
    Sigmoid,
}

impl ClassActivation {
    /// Returns the activation of a `problem_type`, as transformers names them.
    ///
    /// # Errors
    ///
    /// When the type is not one of classification.
    pub fn of(problem_type: Option<&str>) -> Result<Self, String> {
        match problem_type {
            None | Some("single_label_classification") => Ok(Self::Softmax),
            Some("multi_label_classification") => Ok(Self::Sigmoid),
            Some(other) => Err(format!(
                "problem_type is {:?}; single_label_classification and \
                 multi_label_classification are supported",
                Excerpt::of(other)
            )),
        }
    }

    /// Returns the `problem_type` of the activation.
    pub(crate) fn problem_type(self) -> &'static str {
        match self {
            Self::Softmax => "single_label_classification",
            Self::Sigmoid => "multi_label_classification",
        }
    }
}

/// Settings that have passed their checks.
#[derive(Debug, Clone)]
pub(crate) struct ModelSettings {
    /// Palette in token order: red, green and blue in [-1, 1].
    pub(crate) clusters: Vec<[f64; 3]>,
    /// Side in pixels of the square that an image is reduced to.
    pub(crate) side: u32,
    /// True if config.json has `vocab_size` and `n_positions`.
    pub(crate) sizes_are_given: bool,
    pub(crate) n_layers: Option<u32>,
    /// Class names by index; empty if config.json has none.
    pub(crate) labels: Vec<String>,
    pub(crate) activation: ClassActivation,
    pub(crate) notice: String,
    /// Path of config.json for error texts, also if there is none.
    config: PathBuf,
}

impl ModelSettings {
    /// Reads the settings in the directory of a checkpoint.
    ///
    /// # Errors
    ///
    /// When a file is missing or its content cannot be served.
    pub(crate) fn of_checkpoint(folder: &Path) -> Result<Self, ModelError> {
        let file = |name: &str| Some(folder.join(name)).filter(|path| path.is_file());
        let config = file(architecture::FILE);
        Self::read(folder, file(PREPROCESSOR), config, |_, _| {})
    }

    /// Reads the two files of a model in `dir`, and tells `note` the digest of
    /// each.
    ///
    /// # Errors
    ///
    /// When the preprocessor's file is missing, or the content of a file cannot
    /// be served.
    pub(super) fn read(
        dir: &Path,
        preprocessor: Option<PathBuf>,
        config: Option<PathBuf>,
        mut note: impl FnMut(&Path, &Sha256Digest),
    ) -> Result<Self, ModelError> {
        let preprocessor_path = preprocessor.ok_or_else(|| {
            ModelError::new(
                &dir.join(PREPROCESSOR),
                "the file is missing; it holds the palette (clusters) that turns images into \
                 tokens",
            )
        })?;
        let preprocessor: PreprocessorConfig = read_json(&preprocessor_path, &mut note)?;
        let (clusters, side) = palette(&preprocessor_path, preprocessor)?;
        let values: Config = match &config {
            Some(path) => read_json(path, &mut note)?,
            None => Config::default(),
        };
        let config = config.unwrap_or_else(|| dir.join(architecture::FILE));
        if let Some(model_type) = &values.model_type
            && model_type != "imagegpt"
        {
            return Err(ModelError::new(
                &config,
                format!("model_type is {model_type:?}; this worker serves only \"imagegpt\""),
            ));
        }
        let settings = Self {
            clusters,
            side,
            sizes_are_given: values.vocab_size.is_some() && values.n_positions.is_some(),
            n_layers: values.n_layer,
            labels: labels(&config, values.id2label)?,
            activation: ClassActivation::of(values.problem_type.as_deref())
                .map_err(|reason| ModelError::new(&config, reason))?,
            notice: values.notice.unwrap_or_default(),
            config,
        };
        settings.check_sizes(values.vocab_size, values.n_positions)?;
        Ok(settings)
    }

    /// Refuses a vocabulary that does not fit the palette, and a number of
    /// positions that does not fit the image size.
    pub(crate) fn check_sizes(
        &self,
        vocab_size: Option<u64>,
        n_positions: Option<u64>,
    ) -> Result<(), ModelError> {
        let n_colors = self.clusters.len();
        if let Some(vocab_size) = vocab_size
            && vocab_size != n_colors as u64 + 1
        {
            return Err(ModelError::new(
                &self.config,
                format!(
                    "vocab_size is {vocab_size}, but it must be {}: the palette has {n_colors} \
                     colors, and the start token is one more",
                    n_colors + 1
                ),
            ));
        }
        let side = self.side;
        let positions = u64::from(side) * u64::from(side);
        if let Some(n_positions) = n_positions
            && n_positions != positions
        {
            return Err(ModelError::new(
                &self.config,
                format!(
                    "n_positions is {n_positions}, but images of {side} x {side} have {positions} \
                     tokens"
                ),
            ));
        }
        Ok(())
    }

    /// Refuses labels that do not fit a head of `n_classes` classes.
    pub(crate) fn check_classes(&self, n_classes: usize) -> Result<(), ModelError> {
        check_classes(self.labels.len(), n_classes)
            .map_err(|reason| ModelError::new(&self.config, reason))
    }
}

/// Refuses a number of labels that does not fit a head of `n_classes` classes.
/// Without labels every head fits.
pub(crate) fn check_classes(n_labels: usize, n_classes: usize) -> Result<(), String> {
    if n_labels == 0 || n_labels == n_classes {
        return Ok(());
    }
    Err(format!(
        "the head has {n_classes} classes, but config.json names {n_labels}"
    ))
}

fn palette(path: &Path, config: PreprocessorConfig) -> Result<(Vec<[f64; 3]>, u32), ModelError> {
    let refuse = |reason: String| Err(ModelError::new(path, reason));
    for (key, value) in [
        ("do_resize", config.do_resize),
        ("do_normalize", config.do_normalize),
        ("do_color_quantize", config.do_color_quantize),
    ] {
        if value == Some(false) {
            return refuse(format!("{key} is false; only true is supported"));
        }
    }
    if let Some(resample) = config.resample
        && resample != BILINEAR
    {
        return refuse(format!(
            "resample is {resample}; only 2 (bilinear) is supported"
        ));
    }
    let side = match config.size {
        Some(
            Size::Side(side)
            | Size::Shortest {
                shortest_edge: side,
            },
        ) => side,
        Some(Size::Edges { height, width }) if height == width => height,
        Some(Size::Edges { height, width }) => {
            return refuse(format!("size is {height} x {width}; it must be square"));
        }
        None => return refuse("size is missing; for ImageGPT it is 32".to_owned()),
    };
    if !(1..=SIDE_MAX).contains(&side) {
        return refuse(format!("size is {side}; it must be 1 to {SIDE_MAX}"));
    }
    let rows = config.clusters.unwrap_or_default();
    if rows.is_empty() {
        return refuse("clusters is missing; it is the palette of the tokens' colors".to_owned());
    }
    // Token ids have 16 bits, and one id is the start token.
    if rows.len() >= usize::from(u16::MAX) {
        return refuse(format!(
            "clusters has {} rows; the limit is {}",
            rows.len(),
            u16::MAX - 1
        ));
    }
    let mut clusters = Vec::with_capacity(rows.len());
    for (idx, row) in rows.iter().enumerate() {
        let Ok(color) = <[f64; 3]>::try_from(row.as_slice()) else {
            return refuse(format!(
                "clusters[{idx}] has {} numbers; a color has 3",
                row.len()
            ));
        };
        if color.iter().any(|value| !(-1.5..=1.5).contains(value)) {
            return refuse(format!(
                "clusters[{idx}] is {color:?}; colors must be normalized to -1 to 1"
            ));
        }
        clusters.push(color);
    }
    Ok((clusters, side))
}

/// Returns the class names in index order; none if config.json has none.
fn labels(
    path: &Path,
    id2label: Option<BTreeMap<String, String>>,
) -> Result<Vec<String>, ModelError> {
    let id2label = id2label.unwrap_or_default();
    let mut labels = vec![None; id2label.len()];
    for (id, label) in id2label {
        let slot = id.parse::<usize>().ok().and_then(|id| labels.get_mut(id));
        match slot {
            Some(slot @ None) => *slot = Some(label),
            _ => {
                return Err(ModelError::new(
                    path,
                    format!(
                        "id2label has the key {id:?}; keys must be 0, 1, 2 and so on without gaps"
                    ),
                ));
            }
        }
    }
    Ok(labels.into_iter().flatten().collect())
}

fn read_json<T: serde::de::DeserializeOwned>(
    path: &Path,
    note: &mut impl FnMut(&Path, &Sha256Digest),
) -> Result<T, ModelError> {
    let mut text = Vec::new();
    open(path)
        .and_then(|(file, _)| file.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut text))
        .map_err(|error| ModelError::new(path, error))?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return Err(ModelError::new(
            path,
            format!(
                "the file is larger than {CONFIG_BYTES_MAX} bytes, the limit of a configuration"
            ),
        ));
    }
    note(path, &Sha256Digest::from(Sha256::digest(&text)));
    files::json(&text).map_err(|error| ModelError::new(path, error))
}
