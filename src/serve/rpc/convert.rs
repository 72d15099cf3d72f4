//! Conversions between the contract's types and the worker's own.

use bytes::Bytes;

use crate::engine;
use crate::gpu::Gpus;
use crate::imaging::{Alpha, Fit, ImageInput, ImageRequest, PreprocessOptions};
use crate::model::graph::{Context, Graph, Norm, Want, ranges};
use crate::model::{ClassActivation, Model};
use crate::proto::{self, pb};
use crate::serve::devices::DeviceState;
use crate::serve::rpc::error::RequestError;

/// Converts the images of a call; an image without a source becomes an error.
pub(super) fn pictures(
    images: Vec<pb::Image>,
    options: PreprocessOptions,
) -> Vec<Result<ImageRequest, RequestError>> {
    let picture = |image: pb::Image| picture(image.source, options);
    images.into_iter().map(picture).collect()
}

/// Converts one image, in any of its three forms.
pub(super) fn picture(
    source: Option<pb::image::Source>,
    options: PreprocessOptions,
) -> Result<ImageRequest, RequestError> {
    let input = match source.ok_or(RequestError::ImageMissing)? {
        pb::image::Source::Encoded(bytes) => ImageInput::Encoded(bytes),
        pb::image::Source::Rgb8(raw) => ImageInput::Rgb8 {
            width: raw.width,
            height: raw.height,
            pixels: raw.pixels,
        },
        pb::image::Source::Tokens(tokens) => ImageInput::Tokens(tokens.ids),
    };
    Ok(ImageRequest { input, options })
}

/// Returns the bytes that an image holds while it is in the worker.
pub(super) fn picture_bytes(picture: &ImageRequest) -> usize {
    match &picture.input {
        ImageInput::Encoded(bytes) => bytes.len(),
        ImageInput::Rgb8 { pixels, .. } => pixels.len(),
        ImageInput::Tokens(ids) | ImageInput::Prefix(ids) => std::mem::size_of_val(ids.as_slice()),
    }
}

/// Converts a number to an enum of the contract; fails for an unknown number.
fn known<T: TryFrom<i32>>(field: &'static str, value: i32) -> Result<T, RequestError> {
    T::try_from(value).map_err(|_| RequestError::OptionUnknown { field, value })
}

/// Converts options of preprocessing, with defaults filled in.
pub(super) fn preprocess(
    options: Option<&pb::Preprocess>,
) -> Result<PreprocessOptions, RequestError> {
    let (fit, alpha) = preprocess_given(options)?;
    Ok(PreprocessOptions {
        fit: fit.unwrap_or_default(),
        alpha: alpha.unwrap_or_default(),
    })
}

/// Converts the options of preprocessing that a call gives; `None` for each
/// that the call leaves to the worker.
pub(super) fn preprocess_given(
    options: Option<&pb::Preprocess>,
) -> Result<(Option<Fit>, Option<Alpha>), RequestError> {
    let options = options.copied().unwrap_or_default();
    Ok((
        proto::fit(known("preprocess.fit", options.fit)?),
        proto::alpha(known("preprocess.alpha", options.alpha)?),
    ))
}

/// Converts the contract's number of a context.
pub(super) fn context(value: i32) -> Result<Context, RequestError> {
    Ok(match known("context", value)? {
        pb::Context::Unspecified | pb::Context::Raw => Context::Raw,
        pb::Context::SosShifted => Context::SosShifted,
    })
}

/// Returns the values to compute for these options, if the model has them.
pub(super) fn want(
    model: &Model,
    pooling: i32,
    layers: &[u32],
    norm: Norm,
) -> Result<Want, RequestError> {
    let want = match known("pooling", pooling)? {
        pb::Pooling::Unspecified | pb::Pooling::Mean => {
            return model
                .features(layers, norm)
                .ok_or_else(|| RequestError::LayersMissing {
                    given: layers.to_vec(),
                    served: served(&model.layers_served(norm)),
                });
        }
        pb::Pooling::None => Want::States,
        pb::Pooling::Last => Want::Last,
    };
    if !model.graphs.contains_key(&Graph::Hidden) {
        return Err(RequestError::StatesMissing);
    }
    // The model has only the states of the last layer.
    match (layers, model.n_layers) {
        ([], _) => Ok(want),
        (&[layer], Some(last)) if layer == last => Ok(want),
        (layers, last) => Err(RequestError::LayersMissing {
            given: layers.to_vec(),
            served: last.map_or("its last layer only".to_owned(), |last| last.to_string()),
        }),
    }
}

/// Describes the layers that are served, in words.
pub(super) fn served(layers: &[u32]) -> String {
    if layers.is_empty() {
        "its last layer only".to_owned()
    } else {
        ranges(layers)
    }
}

pub(super) fn norm(value: i32) -> Result<Norm, RequestError> {
    Ok(match known("norm", value)? {
        pb::Norm::Unspecified | pb::Norm::PreAttnRms => Norm::PreAttnRms,
        pb::Norm::None => Norm::None,
    })
}

pub(super) fn pooling_applied(want: Want) -> i32 {
    match want {
        Want::Features { .. } | Want::Mean | Want::Logits | Want::Nll => pb::Pooling::Mean,
        Want::States => pb::Pooling::None,
        Want::Last => pb::Pooling::Last,
    }
    .into()
}

/// Returns the layers that were computed; none if the model's number of layers
/// is unknown.
pub(super) fn layers_applied(model: &Model, want: Want) -> Vec<u32> {
    match want {
        Want::Features { layers, .. } => layers
            .iter()
            .map(|layer| u32::try_from(layer).unwrap_or(u32::MAX))
            .collect(),
        Want::Mean | Want::Last | Want::States | Want::Logits | Want::Nll => {
            model.n_layers.into_iter().collect()
        }
    }
}

/// Converts a fallback of the engine for GetModel.
pub(super) fn fallback(fallback: &engine::Fallback) -> pb::Fallback {
    pb::Fallback {
        kind: fallback.kind.label().to_owned(),
        reason: fallback.reason.clone(),
    }
}

/// Converts a device for GetModel, with the facts about its GPU that are known
/// by now.
pub(super) fn device(device: &DeviceState, gpus: Option<&Gpus>) -> pb::Device {
    let facts = device.facts.as_ref();
    let named = pb::Device {
        id: device.id,
        execution_provider: facts.map_or("", |facts| facts.provider).to_owned(),
        serving: device.serves(),
        ..pb::Device::default()
    };
    let Some((gpus, gpu)) = gpus.and_then(|gpus| Some((gpus, gpus.device(device.id)?))) else {
        return named;
    };
    pb::Device {
        name: gpu.name.clone(),
        uuid: gpu.uuid.clone(),
        memory_bytes: gpu.memory_bytes,
        driver_version: gpus.driver_version.clone().unwrap_or_default(),
        cuda_version: gpus.cuda_version.map(String::from).unwrap_or_default(),
        ..named
    }
}

pub(super) fn activation(activation: ClassActivation) -> pb::Activation {
    match activation {
        ClassActivation::Softmax => pb::Activation::Softmax,
        ClassActivation::Sigmoid => pb::Activation::Sigmoid,
    }
}

/// Converts the contract's number of the order of a stream's answers.
pub(super) fn order(value: i32) -> Result<pb::Order, RequestError> {
    known("order", value)
}

/// Converts the contract's number of an element type; the result is never
/// unspecified.
pub(super) fn dtype(value: i32) -> Result<pb::DataType, RequestError> {
    Ok(match known("dtype", value)? {
        pb::DataType::Unspecified | pb::DataType::F32 => pb::DataType::F32,
        pb::DataType::F16 => pb::DataType::F16,
    })
}

pub(super) fn dtype_bytes(dtype: pb::DataType) -> usize {
    match dtype {
        pb::DataType::F16 => 2,
        pb::DataType::F32 | pb::DataType::Unspecified => 4,
    }
}

/// Returns the bytes that an answer holds until it has left: its computed
/// values, its tensor, and the message that carries the tensor.
pub(super) fn answer_bytes(n_values: usize, dtype: pb::DataType) -> usize {
    n_values * (size_of::<f32>() + 2 * dtype_bytes(dtype))
}

/// Encodes values as a tensor: little-endian, row-major.
pub(super) fn tensor(values: &[f32], shape: &[usize], dtype: pb::DataType) -> pb::Tensor {
    let data = match dtype {
        pb::DataType::F16 => values
            .iter()
            .flat_map(|&value| half::f16::from_f32(value).to_le_bytes())
            .collect(),
        // On a little-endian machine the values have the tensor's bytes
        // already.
        _ if cfg!(target_endian = "little") => Bytes::copy_from_slice(bytemuck::cast_slice(values)),
        _ => values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
    };
    pb::Tensor {
        dtype: dtype.into(),
        shape: shape
            .iter()
            .map(|&extent| u32::try_from(extent).unwrap_or(u32::MAX))
            .collect(),
        data,
    }
}

/// Scales each row of `width` numbers to Euclidean length 1. A row of zeros
/// has no direction and stays as it is.
pub(super) fn normalize(values: &mut [f32], width: usize) {
    for row in values.chunks_exact_mut(width.max(1)) {
        let square: f64 = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        if square > 0.0 {
            let length = square.sqrt();
            for value in row {
                #[expect(clippy::cast_possible_truncation, reason = "rounded once to f32")]
                {
                    *value = (f64::from(*value) / length) as f32;
                }
            }
        }
    }
}

/// Returns the `top_k` best classes (0 returns five), best first, and classes
/// with equal scores in index order.
pub(super) fn classes(
    logits: &[f32],
    labels: &[String],
    activation: ClassActivation,
    top_k: u32,
) -> Vec<pb::ClassScore> {
    let scores = scores(logits, activation);
    let mut order: Vec<usize> = (0..scores.len().min(labels.len())).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let n_wanted = if top_k == 0 { 5 } else { top_k as usize };
    order
        .into_iter()
        .take(n_wanted)
        .map(|idx| pb::ClassScore {
            index: u32::try_from(idx).unwrap_or(u32::MAX),
            label: labels[idx].clone(),
            score: scores[idx],
        })
        .collect()
}

#[expect(clippy::cast_possible_truncation, reason = "rounded once to f32")]
fn scores(logits: &[f32], activation: ClassActivation) -> Vec<f32> {
    match activation {
        ClassActivation::Sigmoid => logits
            .iter()
            .map(|&logit| (1.0 / (1.0 + (-f64::from(logit)).exp())) as f32)
            .collect(),
        ClassActivation::Softmax => {
            // The logits are shifted by the largest, so that no exponential
            // overflows.
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights: Vec<f64> = logits
                .iter()
                .map(|&logit| (f64::from(logit) - f64::from(max)).exp())
                .collect();
            let sum: f64 = weights.iter().sum();
            weights.iter().map(|weight| (weight / sum) as f32).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Gpu, Version};

    #[test]
    fn a_device_has_what_the_driver_says() {
        let gpus = Gpus {
            devices: vec![Gpu {
                id: 0,
                name: "A".to_owned(),
                uuid: "GPU-a".to_owned(),
                memory_bytes: 80,
                compute_capability: Version { major: 9, minor: 0 },
            }],
            driver_version: Some("580.1".to_owned()),
            cuda_version: Some(Version {
                major: 13,
                minor: 2,
            }),
            absent: None,
        };
        let of = |id, ended| DeviceState {
            id,
            facts: Some(engine::EngineFacts {
                provider: "cuda",
                runtime_version: String::new(),
                dimension: 0,
                n_classes: 0,
                sequences: None,
                fallbacks: Vec::new(),
                sizes_untried: false,
            }),
            ended,
        };
        let known = device(&of(0, false), Some(&gpus));
        let expected = pb::Device {
            id: 0,
            execution_provider: "cuda".to_owned(),
            serving: true,
            name: "A".to_owned(),
            uuid: "GPU-a".to_owned(),
            memory_bytes: 80,
            driver_version: "580.1".to_owned(),
            cuda_version: "13.2".to_owned(),
        };
        assert_eq!(known, expected);
        // The GPU was not queried yet, or the driver does not see it.
        let bare = pb::Device {
            id: 1,
            execution_provider: "cuda".to_owned(),
            ..pb::Device::default()
        };
        assert_eq!(device(&of(1, true), None), bare);
        assert_eq!(device(&of(1, true), Some(&gpus)), bare);
    }

    #[test]
    fn tensors_are_little_endian() {
        let f32s = tensor(&[1.0, -2.0], &[2], pb::DataType::F32);
        assert_eq!(&f32s.data[..], [0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]);
        let f16s = tensor(&[1.0, -2.0], &[2], pb::DataType::F16);
        assert_eq!(&f16s.data[..], [0, 0x3c, 0, 0xc0]);
        assert_eq!(f16s.shape, [2]);
    }

    #[test]
    fn rows_are_normalized_one_by_one() {
        let mut values = [3.0, 4.0, 0.0, 0.0];
        normalize(&mut values, 2);
        assert_eq!(
            values.map(f32::to_bits),
            [0.6_f32, 0.8, 0.0, 0.0].map(f32::to_bits)
        );
    }

    #[test]
    fn softmax_sums_to_one_and_does_not_overflow() {
        let labels = ["a", "b", "c"].map(String::from);
        let got = classes(
            &[1000.0, 999.0, 1000.0],
            &labels,
            ClassActivation::Softmax,
            0,
        );
        let sum: f32 = got.iter().map(|class| class.score).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        let order: Vec<&str> = got.iter().map(|class| class.label.as_str()).collect();
        assert_eq!(order, ["a", "c", "b"], "equal scores in index order");
    }

    #[test]
    fn sigmoid_scores_are_independent() {
        let labels = ["a", "b"].map(String::from);
        let got = classes(&[0.0, 0.0], &labels, ClassActivation::Sigmoid, 1);
        assert_eq!(got.len(), 1);
        assert!((got[0].score - 0.5).abs() < 1e-7);
    }

    #[test]
    fn layers_in_words() {
        assert_eq!(served(&[0, 1, 2, 24]), "0 to 2 and 24");
        assert_eq!(served(&[3]), "3");
        assert_eq!(served(&[]), "its last layer only");
    }

    #[test]
    fn unknown_enum_values_are_named() {
        let options = pb::Preprocess { fit: 7, alpha: 0 };
        let error = preprocess(Some(&options)).expect_err("7 is no fit");
        assert_eq!(
            error.to_string(),
            "preprocess.fit: 7 is not a value of this enum"
        );
        assert!(context(3).is_err() && norm(4).is_err() && dtype(3).is_err());
        assert_eq!(preprocess(None).expect("defaults").fit, Fit::Squash);
    }
}
