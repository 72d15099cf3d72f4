//! Looks at a request's bytes before they become values.
//!
//! A protobuf message of two bytes an image would become a vector of a hundred
//! bytes an image, so limits that are checked after decoding come too late:
//! a small compressed request could take gigabytes. What is counted here is
//! only what multiplies; everything else keeps its size when it is decoded.

use std::marker::PhantomData;

use bytes::Bytes;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder};
use tonic::{Code, Status};
use tonic_prost::ProstEncoder;
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::proto::{RpcMethod, inference, pb};

/// No flag allows more images a call.
pub(crate) const IMAGES_MAX: usize = 65_536;
/// Far more than all other fields of a request take.
const OTHER_BYTES_MAX: usize = 4096;
/// Tokens of the largest square that a model may have (256 x 256), at the most
/// bytes that an id takes on the wire.
const TOKENS_BYTES_MAX: usize = 65_536 * 6;

/// Tensors of an inference request, of any kind: there is one input and there
/// are few outputs.
const TENSORS_MAX: usize = 64;
/// Numbers of a tensor that are not in raw form, as they are on the wire. A byte
/// there may be eight in memory; 2 Mi tokens and more fit.
const NUMBERS_BYTES_MAX: usize = 4 << 20;

/// Bytes in memory of a token or number that was one byte on the wire, and of an
/// image or element, which was two: vectors double as they grow.
const TOKEN_GROWTH: usize = 2 * size_of::<u32>();
const NUMBER_GROWTH: usize = 2 * size_of::<u64>();
const IMAGE_GROWTH: usize = 2 * size_of::<pb::Image>();
const ELEMENT_GROWTH: usize = 2 * size_of::<bytes::Bytes>();

/// Growth of a message that becomes values, in bytes beside its own: what has a length
/// on the wire and is not numbers stays where it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Growth {
    /// Of this message.
    pub(crate) of: fn(&[u8]) -> usize,
    /// Of any message of so many bytes that is not refused.
    pub(crate) most: fn(usize) -> usize,
}

impl Growth {
    /// Growth of messages that hold names alone.
    pub(crate) const NONE: Self = Self {
        of: |_| 0,
        most: |_| 0,
    };

    /// Growth by the method that gets the message.
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
            // Names.
            _ => Self::NONE,
        }
    }
}

/// Adds up what fields with a length become; what is broken is refused later.
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

/// A message that may be looked at before it is decoded.
pub(crate) trait ScanMessage {
    /// Refuses what would grow out of bounds.
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
        // A prefix, or one image with a byte for each of its pixels, and a few
        // numbers. What is given several times is put together.
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
        // An opening holds options only, an item at most one image. What is given
        // several times is put together.
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
                // Without the contents, which are looked at by themselves.
                INFER_INPUT => contents.scan(content)?,
                RAW_CONTENTS => 0,
                _ => size,
            };
            count_other(n_bytes, &mut n_other_bytes)?;
            if matches!(number, INFER_INPUT | INFER_OUTPUT | RAW_CONTENTS) {
                n_tensors += 1;
                if n_tensors > TENSORS_MAX {
                    return Err(format!("request: more than {TENSORS_MAX} tensors"));
                }
            }
        }
        Ok(())
    }
}

/// What is in a request's tensors, all together.
#[derive(Default)]
struct ContentsSize {
    n_elements: usize,
    n_number_bytes: usize,
}

impl ContentsSize {
    /// Looks through one input; how many bytes its name, shape and parameters
    /// take.
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
                    // Packed, a number has a byte or more; by itself a tag, too.
                    self.n_number_bytes += numbers.len().max(size / 2);
                }
            }
        }
        if self.n_elements > IMAGES_MAX {
            return Err(format!(
                "inputs: more than {IMAGES_MAX} images in one call; split the call"
            ));
        }
        if self.n_number_bytes > NUMBERS_BYTES_MAX {
            return Err(format!(
                "inputs: the contents have more than {NUMBERS_BYTES_MAX} bytes; send them as \
                 raw_input_contents"
            ));
        }
        Ok(n_other_bytes)
    }
}

impl ScanMessage for pb::GetModelRequest {}
// A few names, which keep their size.
impl ScanMessage for inference::ServerLiveRequest {}
impl ScanMessage for inference::ServerReadyRequest {}
impl ScanMessage for inference::ModelReadyRequest {}
impl ScanMessage for inference::ServerMetadataRequest {}
impl ScanMessage for inference::ModelMetadataRequest {}
impl ScanMessage for inference::ModelConfigRequest {}
impl ScanMessage for inference::ModelStatisticsRequest {}
impl ScanMessage for inference::RepositoryIndexRequest {}
// A client trusts the worker that it chose.
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

/// All requests with images have them in field 1.
const IMAGES: u64 = 1;
/// `Image.tokens`.
const TOKENS: u64 = 3;
/// `EmbedStreamRequest.item`.
const STREAM_ITEM: u64 = 2;
/// `EmbedStreamItem.image`.
const ITEM_IMAGE: u64 = 2;

/// `GenerateRequest.prefix` and `GenerateRequest.image`.
const PREFIX: u64 = 1;
const PRIMER_IMAGE: u64 = 2;
/// `ImagePrimer.image`.
const IMAGE_OF_PRIMER: u64 = 1;

/// `ModelInferRequest.inputs`, `outputs` and `raw_input_contents`.
const INFER_INPUT: u64 = 5;
const INFER_OUTPUT: u64 = 6;
const RAW_CONTENTS: u64 = 7;
/// `InferInputTensor.contents`.
const TENSOR_CONTENTS: u64 = 5;
/// `InferTensorContents.bytes_contents`.
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
            "ids: {n_token_bytes} bytes of ids, more than any model takes"
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
                "images: more than {IMAGES_MAX} in one call; split the call"
            ));
        }
        scan_image(content, &mut 0)?;
    }
    Ok(())
}

/// Counts the image's tokens to those before.
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
            "request: options take more than {OTHER_BYTES_MAX} bytes"
        ));
    }
    Ok(())
}

/// The fields of a message: number, content if it has a length, and bytes on
/// the wire.
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
        Some(field.ok_or_else(|| "request: not a protobuf message of this method".to_owned()))
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
            // Groups, which proto3 does not have.
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

/// The codec that generated code uses.
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

/// Decoder that looks at a message before it decodes it.
#[derive(Debug)]
pub(crate) struct ScanningDecoder<U>(PhantomData<U>);

impl<U: prost::Message + ScanMessage + Default> Decoder for ScanningDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        use bytes::Buf as _;
        // tonic gathers a message in one piece before it asks to decode it. As
        // bytes of its own it is decoded in half of the time: the buffer does
        // more for each of a thousand tokens.
        decode(buffer.copy_to_bytes(buffer.remaining())).map(Some)
    }

    fn buffer_settings(&self) -> BufferSettings {
        // An empty buffer takes a message over as it is, where any other would
        // copy it. Nothing is inflated with these settings: a worker does so
        // before, and a client asks for no compression.
        BufferSettings::new(0, 0)
    }
}

/// Decodes a message that was looked at first.
///
/// # Errors
///
/// INVALID_ARGUMENT for bytes that are no message of this kind, or that would
/// grow out of bounds.
pub(crate) fn decode<U: prost::Message + ScanMessage + Default>(
    message: Bytes,
) -> Result<U, Status> {
    U::scan(&message).map_err(|reason| malformed(&reason))?;
    U::decode(message).map_err(|error| malformed(&format!("request: {error}")))
}

/// The refusal of a request that is not what its method takes.
pub(crate) fn malformed(reason: &str) -> Status {
    let details = ErrorDetails::with_error_info("REQUEST_MALFORMED", super::ERROR_DOMAIN, []);
    Status::with_error_details(Code::InvalidArgument, reason, details)
}

#[cfg(test)]
mod tests;
