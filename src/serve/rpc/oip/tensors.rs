//! Conversion of the tensors of requests to images, and of text to tensors.

use bytes::{BufMut as _, Bytes, BytesMut};

use super::parameters;
use crate::excerpt::Excerpt;
use crate::imaging::{ImageInput, ImageRequest, PreprocessOptions};
use crate::proto::inference::model_infer_request::InferInputTensor;
use crate::proto::inference::{InferTensorContents, ModelInferRequest};
use crate::serve::rpc::error::RequestError;

/// Size of the length that precedes each element of a BYTES tensor in raw form.
const LENGTH_BYTES: usize = 4;

/// Only input of a request, checked but not converted to images.
#[derive(Debug)]
pub(super) struct InferInput {
    /// Number of images, the first extent of the shape.
    pub(super) n_images: usize,
    name: &'static str,
    form: Form,
    /// Number of elements of one image.
    n_each: usize,
    contents: Contents,
}

/// Form in which the images are given.
#[derive(Debug, Clone, Copy)]
enum Form {
    /// Encoded image files.
    Encoded,
    /// Tokens as numbers of 4 bytes.
    Ids32,
    /// Tokens as numbers of 8 bytes.
    Ids64,
    /// Decoded pixels.
    Pixels { width: u32, height: u32 },
}

#[derive(Debug)]
enum Contents {
    Raw(Bytes),
    Typed(InferTensorContents),
}

/// Name of the input with encoded image files.
pub(super) const IMAGE: &str = "image";
/// Name of the input with tokens.
pub(super) const INPUT_IDS: &str = "input_ids";
/// Name of the input with decoded pixels.
pub(super) const PIXELS: &str = "pixels";

fn invalid(tensor: &str, problem: impl Into<String>) -> RequestError {
    RequestError::TensorInvalid {
        tensor: tensor.to_owned(),
        problem: problem.into(),
    }
}

impl InferInput {
    /// Takes the input out of a request, for a model whose images have
    /// `positions` tokens.
    pub(super) fn take(
        request: &mut ModelInferRequest,
        positions: usize,
    ) -> Result<Self, RequestError> {
        let mut inputs = std::mem::take(&mut request.inputs);
        let raw = std::mem::take(&mut request.raw_input_contents);
        let n_inputs = inputs.len();
        let (Some(tensor), 1) = (inputs.pop(), n_inputs) else {
            return Err(invalid(
                "inputs",
                format!(
                    "the request has {n_inputs} inputs; send one: {IMAGE}, {INPUT_IDS} or {PIXELS}"
                ),
            ));
        };
        let name = [IMAGE, INPUT_IDS, PIXELS]
            .into_iter()
            .find(|&name| name == tensor.name)
            .ok_or_else(|| {
                let given = Excerpt::of(&tensor.name);
                invalid(
                    "inputs",
                    format!("{given:?} is not an input; send {IMAGE}, {INPUT_IDS} or {PIXELS}"),
                )
            })?;
        parameters::of_input(&tensor.parameters)?;
        let (form, n_images, n_each) = form(name, &tensor, positions)?;
        let contents = contents(name, tensor, raw)?;
        Ok(Self {
            n_images,
            name,
            form,
            n_each,
            contents,
        })
    }

    /// Converts the input to images; an image that is invalid by itself becomes
    /// an error.
    pub(super) fn pictures(
        self,
        options: PreprocessOptions,
    ) -> Result<Vec<Result<ImageRequest, RequestError>>, RequestError> {
        let (name, n_images, n_each) = (self.name, self.n_images, self.n_each);
        let n_elements = n_images
            .checked_mul(n_each)
            .ok_or_else(|| invalid(name, "its shape has more elements than can be counted"))?;
        let picture = |input| ImageRequest { input, options };
        let pictures = match (self.form, self.contents) {
            (Form::Encoded, Contents::Raw(raw)) => elements(name, raw, n_images)?
                .into_iter()
                .map(|file| Ok(picture(ImageInput::Encoded(file))))
                .collect(),
            (Form::Encoded, Contents::Typed(typed)) => {
                let files = typed.bytes_contents;
                check_typed(name, "bytes_contents", files.len(), n_images)?;
                files
                    .into_iter()
                    .map(|file| Ok(picture(ImageInput::Encoded(file))))
                    .collect()
            }
            (Form::Ids32, Contents::Raw(raw)) => {
                check_raw(name, raw.len(), n_elements, size_of::<i32>())?;
                let id = |bytes: &[u8; 4]| i64::from(i32::from_le_bytes(*bytes));
                raw.chunks_exact(n_each * size_of::<i32>())
                    .map(|row| ids(row.as_chunks().0.iter().map(id)).map(picture))
                    .collect()
            }
            (Form::Ids64, Contents::Raw(raw)) => {
                check_raw(name, raw.len(), n_elements, size_of::<i64>())?;
                let id = |bytes: &[u8; 8]| i64::from_le_bytes(*bytes);
                raw.chunks_exact(n_each * size_of::<i64>())
                    .map(|row| ids(row.as_chunks().0.iter().map(id)).map(picture))
                    .collect()
            }
            (Form::Ids32, Contents::Typed(typed)) => {
                let given = typed.int_contents;
                check_typed(name, "int_contents", given.len(), n_elements)?;
                given
                    .chunks_exact(n_each)
                    .map(|row| ids(row.iter().copied().map(i64::from)).map(picture))
                    .collect()
            }
            (Form::Ids64, Contents::Typed(typed)) => {
                let given = typed.int64_contents;
                check_typed(name, "int64_contents", given.len(), n_elements)?;
                given
                    .chunks_exact(n_each)
                    .map(|row| ids(row.iter().copied()).map(picture))
                    .collect()
            }
            (Form::Pixels { width, height }, contents) => {
                let pixels = pixels(name, contents, n_elements)?;
                (0..n_images)
                    .map(|idx| {
                        Ok(picture(ImageInput::Rgb8 {
                            width,
                            height,
                            pixels: pixels.slice(idx * n_each..(idx + 1) * n_each),
                        }))
                    })
                    .collect()
            }
        };
        Ok(pictures)
    }
}

/// Returns the bytes of pixels, from raw or typed contents.
fn pixels(name: &str, contents: Contents, n_elements: usize) -> Result<Bytes, RequestError> {
    match contents {
        Contents::Raw(raw) => {
            check_raw(name, raw.len(), n_elements, 1)?;
            Ok(raw)
        }
        Contents::Typed(typed) => {
            let given = typed.uint_contents;
            check_typed(name, "uint_contents", given.len(), n_elements)?;
            given
                .into_iter()
                .map(u8::try_from)
                .collect::<Result<_, _>>()
                .map_err(|_| invalid(name, "a UINT8 value is over 255"))
        }
    }
}

/// Returns the form of an input, its number of images, and the number of
/// elements of each image.
fn form(
    name: &'static str,
    tensor: &InferInputTensor,
    positions: usize,
) -> Result<(Form, usize, usize), RequestError> {
    let refuse_datatype = |wanted: &str| {
        let given = Excerpt::of(&tensor.datatype);
        Err(invalid(
            name,
            format!("its datatype is {given:?}; it must be {wanted}"),
        ))
    };
    let refuse_shape = |wanted: String| {
        let shape = &tensor.shape[..tensor.shape.len().min(8)];
        Err(invalid(
            name,
            format!("its shape is {shape:?}; it must be {wanted}"),
        ))
    };
    let extent = |extent: &i64| usize::try_from(*extent).ok();
    let shape: Option<Vec<usize>> = tensor.shape.iter().map(extent).collect();
    let shape = shape.unwrap_or_default();
    match (name, tensor.datatype.as_str()) {
        (IMAGE, "BYTES") => match shape[..] {
            // Triton's models have an additional extent of one.
            [n_images] | [n_images, 1] => Ok((Form::Encoded, n_images, 1)),
            _ => refuse_shape("[-1]".to_owned()),
        },
        (IMAGE, _) => refuse_datatype("BYTES"),
        (INPUT_IDS, datatype @ ("INT64" | "INT32")) => match shape[..] {
            [n_images, n_ids] if n_ids == positions => {
                let form = if datatype == "INT64" {
                    Form::Ids64
                } else {
                    Form::Ids32
                };
                Ok((form, n_images, positions))
            }
            _ => refuse_shape(format!("[-1, {positions}]")),
        },
        (INPUT_IDS, _) => refuse_datatype("INT64 or INT32"),
        (_, "UINT8") => {
            let wanted = || refuse_shape("[-1, height, width, 3]".to_owned());
            let [n_images, rows, columns, 3] = shape[..] else {
                return wanted();
            };
            let extents = (u32::try_from(columns), u32::try_from(rows));
            let n_each = rows.checked_mul(columns).and_then(|n| n.checked_mul(3));
            match (extents, n_each) {
                ((Ok(width @ 1..), Ok(height @ 1..)), Some(n_each)) => {
                    Ok((Form::Pixels { width, height }, n_images, n_each))
                }
                _ => wanted(),
            }
        }
        _ => refuse_datatype("UINT8"),
    }
}

/// Returns the contents of the input, raw or typed.
fn contents(
    name: &'static str,
    tensor: InferInputTensor,
    mut raw: Vec<Bytes>,
) -> Result<Contents, RequestError> {
    match (raw.len(), tensor.contents) {
        (0, Some(typed)) => Ok(Contents::Typed(typed)),
        (0, None) => Err(invalid(
            name,
            "it has no data; send contents or raw_input_contents",
        )),
        (_, Some(_)) => Err(invalid(
            name,
            "contents must not be set if raw_input_contents is set",
        )),
        (1, None) => Ok(Contents::Raw(raw.swap_remove(0))),
        (n_raw, None) => Err(invalid(
            "raw_input_contents",
            format!("the request has {n_raw} entries for 1 input; send one entry"),
        )),
    }
}

fn check_raw(
    name: &str,
    n_bytes: usize,
    n_elements: usize,
    width: usize,
) -> Result<(), RequestError> {
    if n_elements.checked_mul(width) == Some(n_bytes) {
        return Ok(());
    }
    Err(invalid(
        name,
        format!(
            "its raw contents have {n_bytes} bytes, but its shape and datatype take {n_elements} \
             times {width}"
        ),
    ))
}

fn check_typed(
    name: &str,
    field: &str,
    n_given: usize,
    n_elements: usize,
) -> Result<(), RequestError> {
    if n_given == n_elements {
        return Ok(());
    }
    Err(invalid(
        name,
        format!("{field} has {n_given} elements, but its shape takes {n_elements}"),
    ))
}

/// Returns the elements of a BYTES tensor in raw form, which share the tensor's
/// memory.
fn elements(name: &str, mut raw: Bytes, n_elements: usize) -> Result<Vec<Bytes>, RequestError> {
    let truncated = |idx: usize| {
        invalid(
            name,
            format!("its raw contents end within element {idx} of {n_elements}"),
        )
    };
    // The capacity is at most the number of lengths for which `raw` has room.
    let mut elements = Vec::with_capacity(n_elements.min(raw.len() / LENGTH_BYTES));
    for idx in 0..n_elements {
        let Some(&length) = raw.first_chunk::<LENGTH_BYTES>() else {
            return Err(truncated(idx));
        };
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        let _ = raw.split_to(LENGTH_BYTES);
        if raw.len() < length {
            return Err(truncated(idx));
        }
        elements.push(raw.split_to(length));
    }
    if raw.is_empty() {
        return Ok(elements);
    }
    Err(invalid(
        name,
        format!(
            "its raw contents have {} bytes after the last of {n_elements} elements",
            raw.len()
        ),
    ))
}

/// Converts numbers to tokens; preprocessing checks later that the palette has
/// them.
fn ids(ids: impl Iterator<Item = i64>) -> Result<ImageInput, RequestError> {
    ids.map(|id| {
        u32::try_from(id).map_err(|_| invalid(INPUT_IDS, format!("{id} is not a color token")))
    })
    .collect::<Result<Vec<u32>, RequestError>>()
    .map(ImageInput::Tokens)
}

/// Appends an element to a BYTES tensor in raw form.
pub(super) fn put_element(raw: &mut BytesMut, element: &str) {
    raw.put_u32_le(u32::try_from(element.len()).unwrap_or(u32::MAX));
    raw.put_slice(element.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_have_their_lengths_before_them() {
        let mut raw = BytesMut::new();
        put_element(&mut raw, "ab");
        put_element(&mut raw, "");
        put_element(&mut raw, "c");
        let raw = raw.freeze();
        let got = elements("image", raw.clone(), 3).expect("three");
        assert_eq!(got, ["ab", "", "c"]);
        for (cut, n, words) in [
            (raw.slice(..raw.len() - 1), 3, "end within element 2 of 3"),
            (raw.slice(..2), 3, "end within element 0 of 3"),
            (raw.clone(), 4, "end within element 3 of 4"),
            (raw.clone(), 2, "5 bytes after the last of 2"),
        ] {
            let error = elements("image", cut, n).expect_err(words).to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
