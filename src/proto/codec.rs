//! Checks of a request's bytes before they are decoded.
//!
//! A protobuf message of two bytes per image would become a vector of a hundred
//! bytes per image, so limits that are checked after decoding come too late: a
//! small compressed request could take gigabytes. Only the fields that grow are
//! counted here; everything else keeps its size when it is decoded.

use std::marker::PhantomData;

use bytes::Bytes;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder};
use tonic::{Code, Status};
use tonic_prost::ProstEncoder;
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::proto::{RpcMethod, inference, pb};

/// Largest number of images in one call; no flag allows more.
pub(crate) const IMAGES_MAX: usize = 65_536;
/// Largest size of all other fields of a request: far more than valid requests
/// need.
const OTHER_BYTES_MAX: usize = 4096;
/// Largest size of an image's tokens: the largest image that a model may have
/// has 256 x 256 tokens, and an id takes at most 6 bytes on the wire.
const TOKENS_BYTES_MAX: usize = 65_536 * 6;

/// Largest number of tensors of an inference request, inputs and outputs
/// together: a request has one input and a few outputs.
const TENSORS_MAX: usize = 64;
/// Largest size on the wire of a request's numbers that are not in raw form.
/// One byte on the wire may become eight in memory; more than 2 Mi tokens fit.
const NUMBERS_BYTES_MAX: usize = 4 << 20;

/// Bytes in memory of a token that was one byte on the wire; the factor 2 is
/// there because vectors double as they grow.
const TOKEN_GROWTH: usize = 2 * size_of::<u32>();
/// Bytes in memory of a number that was one byte on the wire.
const NUMBER_GROWTH: usize = 2 * size_of::<u64>();
/// Bytes in memory of an image that was two bytes on the wire.
const IMAGE_GROWTH: usize = 2 * size_of::<pb::Image>();
/// Bytes in memory of an element that was two bytes on the wire.
const ELEMENT_GROWTH: usize = 2 * size_of::<bytes::Bytes>();

/// Growth of a message when it is decoded, in bytes in addition to its own. A
/// field that has a length on the wire and holds no numbers is not copied.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Growth {
    /// Returns the growth of a given message.
    pub(crate) of: fn(&[u8]) -> usize,
    /// Returns the largest growth of an accepted message of a given size in
    /// bytes.
    pub(crate) most: fn(usize) -> usize,
}

impl Growth {
    /// Growth of messages that hold only names.
    pub(crate) const NONE: Self = Self {
        of: |_| 0,
        most: |_| 0,
    };

    /// Returns the growth of the requests of a method.
    pub(crate) fn of_method(method: RpcMethod) -> Self {
        match method {
            RpcMethod::Embed | RpcMethod::Classify | RpcMethod::Score | RpcMethod::Tokenize => {
                Self {
                    of: |message| {
                        sum(message, |number, content| match number {
                            IMAGES => IMAGE_GROWTH + image_growth(content),
                            _ => 0,
                        })
                    },
                    most: |n_bytes| n_bytes * IMAGE_GROWTH,
                }
            }
            RpcMethod::EmbedStream => Self {
                of: |message| {
                    sum(message, |number, item| match number {
                        STREAM_ITEM => sum(item, |number, content| match number {
                            ITEM_IMAGE => image_growth(content),
                            _ => 0,
                        }),
                        _ => 0,
                    })
                },
                most: |n_bytes| n_bytes.min(TOKENS_BYTES_MAX) * TOKEN_GROWTH,
            },
            RpcMethod::Generate => Self {
                of: |message| {
                    sum(message, |number, content| match number {
                        PREFIX => content.len() * TOKEN_GROWTH,
                        PRIMER_IMAGE => sum(content, |number, content| match number {
                            IMAGE_OF_PRIMER => image_growth(content),
                            _ => 0,
                        }),
                        _ => 0,
                    })
                },
                most: |n_bytes| n_bytes.min(TOKENS_BYTES_MAX) * TOKEN_GROWTH,
            },
            RpcMethod::ModelInfer | RpcMethod::ModelStreamInfer => Self {
                of: infer_growth,
                most: |n_bytes| {
                    n_bytes.min(NUMBERS_BYTES_MAX) * NUMBER_GROWTH
                        + (n_bytes / 2).min(IMAGES_MAX) * ELEMENT_GROWTH
                },
            },
            // The requests of other methods hold only names.
            _ => Self::NONE,
        }
    }
}

/// Adds up the growth of a message's fields that have a length. A broken
/// message is rejected later.
fn sum(message: &[u8], growth: impl Fn(u64, &[u8]) -> usize) -> usize {
    Fields(message)
        .map_while(Result::ok)
        .map(|(number, content, _)| growth(number, content))
        .sum()
}

fn image_growth(image: &[u8]) -> usize {
    sum(image, |number, content| match number {
        TOKENS => content.len() * TOKEN_GROWTH,
        _ => 0,
    })
}

fn infer_growth(message: &[u8]) -> usize {
    sum(message, |number, tensor| match number {
        INFER_INPUT => sum(tensor, |number, contents| match number {
            TENSOR_CONTENTS => Fields(contents)
                .map_while(Result::ok)
                .map(|(number, numbers, size)| match number {
                    BYTES_CONTENTS => ELEMENT_GROWTH,
                    _ => numbers.len().max(size / 2) * NUMBER_GROWTH,
                })
                .sum(),
            _ => 0,
        }),
        _ => 0,
    })
}

/// Message that is checked before it is decoded.
pub(crate) trait ScanMessage {
    /// Fails for a message that would grow out of bounds.
    fn scan(_message: &[u8]) -> Result<(), String> {
        Ok(())
    }
}

impl ScanMessage for pb::EmbedRequest {
    fn scan(message: &[u8]) -> Result<(), String> {
        scan_images(message)
    }
}

impl ScanMessage for pb::ClassifyRequest {
    fn scan(message: &[u8]) -> Result<(), String> {
        scan_images(message)
    }
}

impl ScanMessage for pb::TokenizeRequest {
    fn scan(message: &[u8]) -> Result<(), String> {
        scan_images(message)
    }
}

impl ScanMessage for pb::ScoreRequest {
    fn scan(message: &[u8]) -> Result<(), String> {
        scan_images(message)
    }
}

impl ScanMessage for pb::GenerateRequest {
    fn scan(message: &[u8]) -> Result<(), String> {
        // The request holds a prefix, or one image with a byte per pixel, and a
        // few numbers. Decoding merges a field that is given several times.
        let (mut n_token_bytes, mut n_other_bytes) = (0, 0);
        for field in Fields(message) {
            let (number, content, size) = field?;
            match number {
                PREFIX => count_tokens(content, &mut n_token_bytes)?,
                PRIMER_IMAGE => scan_primer(content, &mut n_token_bytes)?,
                _ => count_other(size, &mut n_other_bytes)?,
            }
        }
        Ok(())
    }
}

impl ScanMessage for pb::EmbedStreamRequest {
    fn scan(message: &[u8]) -> Result<(), String> {
        // An opening holds only options, an item at most one image. Decoding
        // merges a field that is given several times.
        let (mut n_token_bytes, mut n_other_bytes) = (0, 0);
        for field in Fields(message) {
            let (number, content, size) = field?;
            match number {
                STREAM_ITEM => scan_item(content, &mut n_token_bytes)?,
                _ => count_other(size, &mut n_other_bytes)?,
            }
        }
        Ok(())
    }
}

impl ScanMessage for inference::ModelInferRequest {
    fn scan(message: &[u8]) -> Result<(), String> {
        let (mut n_tensors, mut n_other_bytes) = (0, 0);
        let mut contents = ContentsSize::default();
        for field in Fields(message) {
            let (number, content, size) = field?;
            let n_bytes = match number {
                // The contents are counted separately.
                INFER_INPUT => contents.scan(content)?,
                RAW_CONTENTS => 0,
                _ => size,
            };
            count_other(n_bytes, &mut n_other_bytes)?;
            if matches!(number, INFER_INPUT | INFER_OUTPUT | RAW_CONTENTS) {
                n_tensors += 1;
                if n_tensors > TENSORS_MAX {
                    return Err(format!(
                        "request: the request has more than {TENSORS_MAX} tensors, which is the \
                         limit"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Sizes of the contents of all tensors of a request together.
#[derive(Default)]
struct ContentsSize {
    n_elements: usize,
    n_number_bytes: usize,
}

impl ContentsSize {
    /// Adds the contents of one input, and returns the bytes of its name, shape
    /// and parameters.
    fn scan(&mut self, tensor: &[u8]) -> Result<usize, String> {
        let mut n_other_bytes = 0;
        for field in Fields(tensor) {
            let (number, contents, size) = field?;
            if number != TENSOR_CONTENTS {
                n_other_bytes += size;
                continue;
            }
            for field in Fields(contents) {
                let (number, numbers, size) = field?;
                if number == BYTES_CONTENTS {
                    self.n_elements += 1;
                } else {
                    // A packed number takes at least a byte; a single number
                    // has a tag, too.
                    self.n_number_bytes += numbers.len().max(size / 2);
                }
            }
        }
        if self.n_elements > IMAGES_MAX {
            return Err(format!(
                "inputs: the call has more than {IMAGES_MAX} images, which is the limit; split the \
                 call"
            ));
        }
        if self.n_number_bytes > NUMBERS_BYTES_MAX {
            return Err(format!(
                "inputs: the contents have {} bytes; the limit is {NUMBERS_BYTES_MAX}; send them \
                 as raw_input_contents",
                self.n_number_bytes
            ));
        }
        Ok(n_other_bytes)
    }
}

impl ScanMessage for pb::GetModelRequest {}
// These requests hold a few names, which keep their size.
impl ScanMessage for inference::ServerLiveRequest {}
impl ScanMessage for inference::ServerReadyRequest {}
impl ScanMessage for inference::ModelReadyRequest {}
impl ScanMessage for inference::ServerMetadataRequest {}
impl ScanMessage for inference::ModelMetadataRequest {}
impl ScanMessage for inference::ModelConfigRequest {}
impl ScanMessage for inference::ModelStatisticsRequest {}
impl ScanMessage for inference::RepositoryIndexRequest {}
// Responses are not checked, since a client trusts the worker that it chose.
impl ScanMessage for pb::EmbedResponse {}
impl ScanMessage for pb::EmbedStreamResponse {}
impl ScanMessage for pb::ClassifyResponse {}
impl ScanMessage for pb::TokenizeResponse {}
impl ScanMessage for pb::ScoreResponse {}
impl ScanMessage for pb::GenerateResponse {}
impl ScanMessage for pb::GetModelResponse {}
impl ScanMessage for inference::ServerLiveResponse {}
impl ScanMessage for inference::ServerReadyResponse {}
impl ScanMessage for inference::ModelReadyResponse {}
impl ScanMessage for inference::ServerMetadataResponse {}
impl ScanMessage for inference::ModelMetadataResponse {}
impl ScanMessage for inference::ModelInferResponse {}
impl ScanMessage for inference::ModelStreamInferResponse {}
impl ScanMessage for inference::ModelConfigResponse {}
impl ScanMessage for inference::ModelStatisticsResponse {}
impl ScanMessage for inference::RepositoryIndexResponse {}

/// Field number of the images in all requests that have images.
const IMAGES: u64 = 1;
/// Field number of `Image.tokens`.
const TOKENS: u64 = 3;
/// Field number of `EmbedStreamRequest.item`.
const STREAM_ITEM: u64 = 2;
/// Field number of `EmbedStreamItem.image`.
const ITEM_IMAGE: u64 = 2;

/// Field number of `GenerateRequest.prefix`.
const PREFIX: u64 = 1;
/// Field number of `GenerateRequest.image`.
const PRIMER_IMAGE: u64 = 2;
/// Field number of `ImagePrimer.image`.
const IMAGE_OF_PRIMER: u64 = 1;

/// Field number of `ModelInferRequest.inputs`.
const INFER_INPUT: u64 = 5;
/// Field number of `ModelInferRequest.outputs`.
const INFER_OUTPUT: u64 = 6;
/// Field number of `ModelInferRequest.raw_input_contents`.
const RAW_CONTENTS: u64 = 7;
/// Field number of `InferInputTensor.contents`.
const TENSOR_CONTENTS: u64 = 5;
/// Field number of `InferTensorContents.bytes_contents`.
const BYTES_CONTENTS: u64 = 8;

fn scan_primer(primer: &[u8], n_token_bytes: &mut usize) -> Result<(), String> {
    for field in Fields(primer) {
        let (number, content, _) = field?;
        if number == IMAGE_OF_PRIMER {
            scan_image(content, n_token_bytes)?;
        }
    }
    Ok(())
}

fn count_tokens(ids: &[u8], n_token_bytes: &mut usize) -> Result<(), String> {
    *n_token_bytes += ids.len();
    if *n_token_bytes > TOKENS_BYTES_MAX {
        return Err(format!(
            "ids: the ids have {n_token_bytes} bytes; the limit is {TOKENS_BYTES_MAX}, more than \
             any model takes"
        ));
    }
    Ok(())
}

fn scan_images(message: &[u8]) -> Result<(), String> {
    let (mut n_images, mut n_other_bytes) = (0, 0);
    for field in Fields(message) {
        let (number, content, size) = field?;
        if number != IMAGES {
            count_other(size, &mut n_other_bytes)?;
            continue;
        }
        n_images += 1;
        if n_images > IMAGES_MAX {
            return Err(format!(
                "images: the call has more than {IMAGES_MAX} images, which is the limit; split the \
                 call"
            ));
        }
        scan_image(content, &mut 0)?;
    }
    Ok(())
}

/// Adds the bytes of an image's tokens to `n_token_bytes`, and checks the
/// limit.
fn scan_image(image: &[u8], n_token_bytes: &mut usize) -> Result<(), String> {
    for field in Fields(image) {
        let (number, content, _) = field?;
        if number == TOKENS {
            count_tokens(content, n_token_bytes)?;
        }
    }
    Ok(())
}

fn scan_item(item: &[u8], n_token_bytes: &mut usize) -> Result<(), String> {
    for field in Fields(item) {
        let (number, content, _) = field?;
        if number == ITEM_IMAGE {
            scan_image(content, n_token_bytes)?;
        }
    }
    Ok(())
}

fn count_other(size: usize, n_other_bytes: &mut usize) -> Result<(), String> {
    *n_other_bytes += size;
    if *n_other_bytes > OTHER_BYTES_MAX {
        return Err(format!(
            "request: the options take more than {OTHER_BYTES_MAX} bytes, which is the limit"
        ));
    }
    Ok(())
}

/// Iterator over the fields of a message: the number of each field, its content
/// if the field has a length, and its bytes on the wire.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, &'a [u8], usize), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            // Nothing after a broken field can be trusted.
            self.0 = &[];
        }
        Some(field.ok_or_else(|| {
            "request: the bytes are not a protobuf message of this method".to_owned()
        }))
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, &'a [u8], usize)> {
        let start = self.0.len();
        let tag = self.varint()?;
        let content = match tag & 7 {
            0 => {
                self.varint()?;
                &[]
            }
            1 => self.take(8)?,
            2 => {
                let len = usize::try_from(self.varint()?).ok()?;
                self.take(len)?
            }
            5 => self.take(4)?,
            // Other wire types are groups, which proto3 does not have.
            _ => return None,
        };
        Some((tag >> 3, content, start - self.0.len()))
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for idx in 0..10 {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << (7 * idx).min(63);
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (content, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(content)
    }
}

/// Codec of the generated code, which checks messages before it decodes them.
#[derive(Debug, Clone)]
pub(crate) struct ScanningCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for ScanningCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for ScanningCodec<T, U>
where
    T: prost::Message + Send + 'static,
    U: prost::Message + ScanMessage + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ScanningDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        ScanningDecoder(PhantomData)
    }
}

/// Decoder that checks a message before it decodes the message.
#[derive(Debug)]
pub(crate) struct ScanningDecoder<U>(PhantomData<U>);

impl<U: prost::Message + ScanMessage + Default> Decoder for ScanningDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        use bytes::Buf as _;
        // tonic gathers a message in one piece before it calls the decoder.
        // Decoding from `Bytes` takes half of the time of decoding from the
        // buffer, which does more work for each of a thousand tokens.
        decode(buffer.copy_to_bytes(buffer.remaining())).map(Some)
    }

    fn buffer_settings(&self) -> BufferSettings {
        // An empty buffer takes over a message without a copy; any other buffer
        // would copy it. No message is inflated with these settings: a worker
        // inflates messages before, and a client asks for no compression.
        BufferSettings::new(0, 0)
    }
}

/// Checks a message and decodes it.
///
/// # Errors
///
/// Returns INVALID_ARGUMENT for bytes that are not a message of this type, or
/// that would grow out of bounds.
pub(crate) fn decode<U: prost::Message + ScanMessage + Default>(
    message: Bytes,
) -> Result<U, Status> {
    U::scan(&message).map_err(|reason| malformed(&reason))?;
    U::decode(message).map_err(|error| malformed(&format!("request: {error}")))
}

/// Returns the status that rejects a malformed request.
pub(crate) fn malformed(reason: &str) -> Status {
    let details = ErrorDetails::with_error_info("REQUEST_MALFORMED", super::ERROR_DOMAIN, []);
    Status::with_error_details(Code::InvalidArgument, reason, details)
}

#[cfg(test)]
mod tests;
