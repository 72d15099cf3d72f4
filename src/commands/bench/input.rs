//! Images that are sent, encoded in advance.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;
use bytes::Bytes;
use prost::Message as _;

use super::random::SplitMix64;
use crate::client::load::put_field;
use crate::commands::input;
use crate::proto::pb;

/// Number of random images that all others are made from.
const TEMPLATES: u64 = 64;
/// Number of images that repeat, with `--repeat-share`.
const HOT: u64 = 16;
/// Most files that are read of `--images`, and their largest size in total: the
/// files stay in memory.
const FILES_MAX: usize = 4096;
const FILES_BYTES_MAX: u64 = 512 << 20;
/// Field number of `EmbedRequest.images`, which is the same in the other
/// requests.
const IMAGES: u32 = 1;
/// First token id that takes two bytes on the wire.
const ONE_BYTE: u64 = 128;

/// Source of images, shared by all callers. Each image has a number.
#[derive(Debug)]
pub(super) struct BenchImages {
    kind: Kind,
    seed: u64,
    repeat_share: f64,
    next: AtomicU64,
}

#[derive(Debug)]
enum Kind {
    /// Random tokens; every number makes a different image.
    Tokens(Vec<Template>),
    /// Encoded `pb::Image`s of files, repeated in a cycle.
    Files(Vec<Bytes>),
}

/// A random image that is varied by its first tokens, which spell the image's
/// number. In this way all images differ, and making one is only a copy.
#[derive(Debug)]
struct Template {
    tokens: Vec<u16>,
    /// An encoded `pb::Image` with these tokens.
    encoded: Vec<u8>,
    /// Offset of the token ids in `encoded`; the ids that spell the number take
    /// one byte each.
    ids_at: usize,
    /// Number of tokens that spell the number.
    n_digits: usize,
    /// Number of values that each of these tokens can have.
    base: u64,
}

/// An image to send, and its number.
#[derive(Debug, Clone)]
pub(super) struct MadeImage {
    pub(super) number: u64,
    /// An encoded [`pb::Image`].
    pub(super) encoded: Bytes,
}

impl BenchImages {
    /// Makes images of random tokens in the model's shape.
    pub(super) fn tokens(model: &pb::GetModelResponse, seed: u64, repeat_share: f64) -> Self {
        let n_positions = model.positions as usize;
        let n_colors = (model.palette_rgb8.len() / 3) as u64;
        let template = |idx| Template::new(&mut SplitMix64::fork(seed, idx), n_positions, n_colors);
        Self::of(
            Kind::Tokens((0..TEMPLATES).map(template).collect()),
            seed,
            repeat_share,
        )
    }

    /// Reads the image files of a directory.
    ///
    /// # Errors
    ///
    /// When there is no image, or a file cannot be read.
    pub(super) fn folder(folder: &Path, seed: u64, repeat_share: f64) -> anyhow::Result<Self> {
        let found = input::find_images(folder)?.into_iter();
        let found = found.filter(|found| found.file.is_ok());
        let paths = input::sample(found.map(|found| found.path).collect(), FILES_MAX);
        anyhow::ensure!(
            !paths.is_empty(),
            "--images {} has no images that can be read",
            folder.display()
        );
        let (mut files, mut n_bytes) = (Vec::with_capacity(paths.len()), 0);
        for path in paths {
            let bytes = std::fs::read(&path)
                .with_context(|| format!("{} cannot be read", path.display()))?;
            n_bytes += bytes.len() as u64;
            anyhow::ensure!(
                n_bytes <= FILES_BYTES_MAX,
                "--images {}: the files have more than {} in total; use a smaller directory",
                folder.display(),
                bytesize::ByteSize(FILES_BYTES_MAX)
            );
            let source = pb::image::Source::Encoded(bytes.into());
            let image = pb::Image {
                source: Some(source),
            };
            files.push(Bytes::from(image.encode_to_vec()));
        }
        Ok(Self::of(Kind::Files(files), seed, repeat_share))
    }

    fn of(kind: Kind, seed: u64, repeat_share: f64) -> Self {
        Self {
            kind,
            seed,
            repeat_share,
            next: AtomicU64::new(0),
        }
    }

    /// Number of different images; `None` if there is no limit.
    pub(super) fn n_distinct(&self) -> Option<usize> {
        match &self.kind {
            Kind::Tokens(_) => None,
            Kind::Files(files) => Some(files.len()),
        }
    }

    /// Description of the images for the report.
    pub(super) fn describe(&self) -> String {
        let repeated = if self.repeat_share > 0.0 {
            format!(
                "; {:.0} % from {HOT} images that repeat",
                100.0 * self.repeat_share
            )
        } else {
            String::new()
        };
        match &self.kind {
            Kind::Tokens(_) => format!("random tokens, all images different{repeated}"),
            Kind::Files(files) => format!(
                "{} files in a cycle, which the worker's cache may know{repeated}",
                files.len()
            ),
        }
    }

    /// Returns the next image: one that has not been sent before, or, with the
    /// probability of `--repeat-share`, one of those that repeat.
    pub(super) fn next(&self) -> MadeImage {
        let count = self.next.fetch_add(1, Ordering::Relaxed);
        let mut random = SplitMix64::fork(self.seed, count);
        let number = if self.repeat_share > 0.0 && random.unit() < self.repeat_share {
            random.below(HOT)
        } else {
            HOT + count
        };
        self.picture(number)
    }

    /// Returns the image of a number, which is always the same.
    pub(super) fn picture(&self, number: u64) -> MadeImage {
        let encoded = match &self.kind {
            Kind::Tokens(templates) => pick(templates, number).spell(number),
            Kind::Files(files) => pick(files, number).clone(),
        };
        MadeImage { number, encoded }
    }

    /// Returns the tokens of an image, or `None` if it comes from a file.
    pub(super) fn tokens_of(&self, number: u64) -> Option<Vec<u16>> {
        match &self.kind {
            Kind::Tokens(templates) => Some(pick(templates, number).tokens_of(number)),
            Kind::Files(_) => None,
        }
    }
}

/// Picks an item by number. The list is never empty.
fn pick<T>(items: &[T], number: u64) -> &T {
    let n_items = items.len() as u64;
    &items[usize::try_from(number % n_items).unwrap_or(0)]
}

/// Encodes a request of any method with these images and default options.
pub(super) fn request(pictures: &[MadeImage]) -> Bytes {
    let n_bytes: usize = pictures
        .iter()
        .map(|picture| picture.encoded.len() + 8)
        .sum();
    let mut body = Vec::with_capacity(n_bytes);
    for picture in pictures {
        put_field(IMAGES, &picture.encoded, &mut body);
    }
    body.into()
}

impl Template {
    fn new(random: &mut SplitMix64, n_positions: usize, n_colors: u64) -> Self {
        let base = n_colors.clamp(1, ONE_BYTE);
        // Enough digits for 64 bits, or one per position if there are fewer.
        let digits_wanted = if base < 2 { 0 } else { 64 / base.ilog2() + 1 };
        let n_digits = n_positions.min(digits_wanted as usize);
        let tokens: Vec<u16> = (0..n_positions)
            .map(|position| match position {
                _ if position < n_digits => 0,
                _ => u16::try_from(random.below(n_colors)).unwrap_or(0),
            })
            .collect();
        let ids: Vec<u32> = tokens.iter().copied().map(u32::from).collect();
        let n_id_bytes: usize = ids
            .iter()
            .map(|&id| prost::encoding::encoded_len_varint(id.into()))
            .sum();
        let source = pb::image::Source::Tokens(pb::Tokens { ids });
        let image = pb::Image {
            source: Some(source),
        };
        let encoded = image.encode_to_vec();
        Self {
            ids_at: encoded.len() - n_id_bytes,
            tokens,
            encoded,
            n_digits,
            base,
        }
    }

    /// Returns the digits of a number, each below 128.
    fn digits(&self, number: u64) -> impl Iterator<Item = u8> {
        let base = self.base.max(2);
        let digits = std::iter::successors(Some(number), move |rest| Some(rest / base));
        digits
            .take(self.n_digits)
            .map(move |rest| u8::try_from(rest % base).unwrap_or(0))
    }

    fn spell(&self, number: u64) -> Bytes {
        let mut encoded = self.encoded.clone();
        let ids = &mut encoded[self.ids_at..];
        for (id, digit) in ids.iter_mut().zip(self.digits(number)) {
            *id = digit;
        }
        encoded.into()
    }

    fn tokens_of(&self, number: u64) -> Vec<u16> {
        let mut tokens = self.tokens.clone();
        for (token, digit) in tokens.iter_mut().zip(self.digits(number)) {
            *token = digit.into();
        }
        tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(n_positions: u32, n_colors: usize, repeat_share: f64) -> BenchImages {
        let model = pb::GetModelResponse {
            positions: n_positions,
            palette_rgb8: vec![0; n_colors * 3].into(),
            ..Default::default()
        };
        BenchImages::tokens(&model, 5, repeat_share)
    }

    fn decoded(picture: &MadeImage) -> Vec<u16> {
        let image = pb::Image::decode(picture.encoded.clone()).unwrap();
        let Some(pb::image::Source::Tokens(tokens)) = image.source else {
            panic!("no tokens");
        };
        let ids = tokens.ids.into_iter().map(u16::try_from);
        ids.map(Result::unwrap).collect()
    }

    #[test]
    fn images_are_what_they_say_and_differ() {
        for (n_positions, n_colors) in [(1024, 512), (64, 16), (4, 2), (1, 1)] {
            let input = input(n_positions, n_colors, 0.0);
            let mut seen = std::collections::HashSet::new();
            for _ in 0..500 {
                let picture = input.next();
                let tokens = decoded(&picture);
                assert_eq!(tokens.len(), n_positions as usize);
                assert!(tokens.iter().all(|&token| usize::from(token) < n_colors));
                assert_eq!(Some(&tokens), input.tokens_of(picture.number).as_ref());
                seen.insert(tokens);
            }
            if n_positions >= 64 {
                assert_eq!(seen.len(), 500);
            }
        }
    }

    #[test]
    fn a_share_repeats() {
        let input = input(64, 16, 0.5);
        let repeated = (0..1000).filter(|_| input.next().number < HOT).count();
        assert!((400..600).contains(&repeated), "{repeated}");
    }

    #[test]
    fn a_request_is_what_the_contract_says() {
        let input = input(64, 16, 0.0);
        let pictures: Vec<MadeImage> = (0..3).map(|_| input.next()).collect();
        let request = pb::EmbedRequest::decode(request(&pictures)).unwrap();
        let expected: Vec<pb::Image> = pictures
            .iter()
            .map(|picture| pb::Image::decode(picture.encoded.clone()).unwrap())
            .collect();
        assert_eq!(
            request,
            pb::EmbedRequest {
                images: expected,
                ..Default::default()
            }
        );
    }
}
