//! Images that a command reads, and the number of images per call.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::Bytes;
use bytesize::ByteSize;
use clap::Args;
use tokio::sync::mpsc;

use crate::files::{self, FoundFile, Trouble};
use crate::imaging::{Alpha, Fit, PreprocessOptions};
use crate::proto::pb;
use crate::serve::config::LimitsConfig;

/// Name of standard input as an input.
const STDIN: &str = "-";
/// Bytes of files that go into one call, unless a single file is larger. A
/// client holds a few calls of this size in memory.
const CALL_BYTES_MAX: u64 = 16 << 20;
/// Bytes of a message per image besides the image, and besides all images.
const IMAGE_OVERHEAD: u64 = 16;
const MESSAGE_OVERHEAD: u64 = 1024;

/// Flags that name the images.
#[derive(Debug, Clone, Args)]
pub struct InputConfig {
    /// Images (PNG, JPEG, WebP, GIF, BMP, TIFF), directories of images
    /// including their subdirectories, or - for the bytes of one image on
    /// standard input
    #[arg(value_name = "INPUT", required_unless_present = "list")]
    pub inputs: Vec<PathBuf>,

    /// File that names more inputs, one per line; - reads the list from
    /// standard input
    #[arg(long, value_name = "FILE")]
    pub list: Option<PathBuf>,
}

impl InputConfig {
    /// Checks the rules that clap cannot check.
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        let list = self.list.as_deref().into_iter();
        only_one_stdin(self.inputs.iter().map(PathBuf::as_path).chain(list))
    }
}

/// Checks that standard input, which can be read only once, is at most one of
/// the inputs.
pub(super) fn only_one_stdin<'a>(inputs: impl Iterator<Item = &'a Path>) -> anyhow::Result<()> {
    let n = inputs.filter(|path| *path == Path::new(STDIN)).count();
    anyhow::ensure!(
        n < 2,
        "standard input (-) is given {n} times; it can be read only once"
    );
    Ok(())
}

/// Help of `--fit` for commands that classify.
pub(super) const FIT_HELP: &str = "Way in which an image becomes square: resized straight to the \
                                   model's side (squash), or its center cut out (center-crop) \
                                   [default: as the linear head was trained if it says so, or \
                                   else squash]";
/// Help of `--alpha` for commands that classify.
pub(super) const ALPHA_HELP: &str = "Color of transparent pixels: the color stored under them \
                                     (drop), or white [default: as the linear head was trained if \
                                     it says so, or else drop]";

/// Flags for the way from an image file to tokens.
#[derive(Debug, Clone, Copy, Args)]
pub struct PreprocessConfig {
    /// Way in which an image becomes square: resized straight to the model's
    /// side (squash), or its center cut out (center-crop) [default: squash]
    #[arg(long, value_enum)]
    pub fit: Option<Fit>,

    /// Color of transparent pixels: the color stored under them (drop), or
    /// white [default: drop]
    #[arg(long, value_enum)]
    pub alpha: Option<Alpha>,
}

impl PreprocessConfig {
    /// Returns the options without a linear head, with defaults filled in.
    pub(super) fn options(self) -> PreprocessOptions {
        PreprocessOptions {
            fit: self.fit.unwrap_or_default(),
            alpha: self.alpha.unwrap_or_default(),
        }
    }

    /// Returns the options to send; what the flags leave open is the worker's
    /// choice.
    pub(super) fn to_pb(self) -> pb::Preprocess {
        self.with_head(None)
    }

    /// Returns the options to send with calls whose images should become tokens
    /// as those on which `head` was trained.
    pub(super) fn with_head(self, head: Option<&pb::Head>) -> pb::Preprocess {
        let (fit, alpha) = head.map_or((0, 0), |head| (head.fit, head.alpha));
        pb::Preprocess {
            fit: self.fit.map_or(fit, |fit| pb::Fit::from(fit).into()),
            alpha: self
                .alpha
                .map_or(alpha, |alpha| pb::Alpha::from(alpha).into()),
        }
    }
}

/// Limits of one call.
#[derive(Debug, Clone, Copy)]
pub(super) struct CallLimits {
    pub(super) images: usize,
    /// Bytes of a call's images together.
    pub(super) bytes: u64,
    /// Bytes of one image.
    pub(super) image_bytes: u64,
}

impl CallLimits {
    /// Returns limits with one image per call, of the size that a worker with
    /// these limits would take.
    pub(super) fn one(limits: &LimitsConfig) -> Self {
        Self::new(&pb::Limits {
            batch_size_max: 1,
            images_per_call_max: 1,
            images_in_flight_max: 1,
            request_bytes_max: limits.request_bytes_max.as_u64(),
            image_bytes_max: limits.image_bytes_max.as_u64(),
            ..Default::default()
        })
    }

    /// Returns limits with the images of one model run per call, so that
    /// answers arrive as they are ready. The worker forms batches across calls.
    pub(super) fn new(limits: &pb::Limits) -> Self {
        let images = [
            limits.batch_size_max,
            limits.images_per_call_max,
            limits.images_in_flight_max,
        ];
        let images = images.into_iter().min().unwrap_or_default().max(1);
        let message = limits.request_bytes_max.saturating_sub(MESSAGE_OVERHEAD);
        Self {
            images: images as usize,
            bytes: message.min(CALL_BYTES_MAX),
            image_bytes: message
                .saturating_sub(IMAGE_OVERHEAD)
                .min(limits.image_bytes_max),
        }
    }
}

/// Inputs of a command, which are found and read one after the other as they
/// are needed.
pub(super) struct Inputs {
    sources: Box<dyn Iterator<Item = Result<Source, CallImage>> + Send>,
}

/// Input that was found: standard input or a file.
#[derive(Debug, PartialEq, Eq)]
enum Source {
    Stdin,
    File(PathBuf),
}

/// Image of a call: its bytes, or the reason for which there are none.
#[derive(Debug)]
pub(super) struct CallImage {
    name: String,
    bytes: Result<Bytes, String>,
}

impl Inputs {
    /// Finds the inputs that the flags name.
    ///
    /// # Errors
    ///
    /// When the list cannot be opened.
    pub(super) fn new(config: &InputConfig) -> anyhow::Result<Self> {
        let list = config.list.as_deref().map(lines).transpose()?;
        let listed = list.into_iter().flatten().flat_map(|line| match line {
            Ok(path) => expand(path),
            Err(item) => vec![Err(item)].into(),
        });
        Ok(Self {
            sources: Box::new(given(config.inputs.clone()).chain(listed)),
        })
    }

    pub(super) fn of(inputs: Vec<PathBuf>) -> Self {
        Self {
            sources: Box::new(given(inputs)),
        }
    }

    /// Keeps at most `n` of the images, evenly spread. Inputs that cannot be
    /// found are kept as well, so that their errors are reported. Takes the
    /// time that it takes to find all inputs.
    pub(super) fn sample(self, n: usize) -> Self {
        let is_there = |source: &Result<Source, CallImage>| match source {
            Ok(Source::Stdin) => true,
            Ok(Source::File(path)) => path.exists(),
            Err(_) => false,
        };
        let (found, failed): (Vec<_>, Vec<_>) = self.sources.partition(is_there);
        Self {
            sources: Box::new(failed.into_iter().chain(sample(found, n))),
        }
    }

    /// Reads the inputs on a thread, in batches of one call, one batch ahead.
    pub(super) fn batches(self, limits: CallLimits) -> anyhow::Result<mpsc::Receiver<CallBatch>> {
        let (batches_in, batches) = mpsc::channel(1);
        let read = move || {
            let items = self.sources.map(|source| match source {
                Ok(source) => source.read(limits.image_bytes),
                Err(item) => item,
            });
            for batch in (Batches {
                items,
                next: None,
                limits,
            }) {
                // The receiver was dropped.
                if batches_in.blocking_send(batch).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name("read".to_owned())
            .spawn(read)
            .context("cannot start a thread that reads images")?;
        Ok(batches)
    }
}

/// Finds the images that the arguments of the command line name.
fn given(inputs: Vec<PathBuf>) -> impl Iterator<Item = Result<Source, CallImage>> + Send {
    inputs.into_iter().flat_map(|path| {
        if path == Path::new(STDIN) {
            VecDeque::from([Ok(Source::Stdin)])
        } else {
            expand(path)
        }
    })
}

/// Finds every image below the directory `folder`, by name, and every entry
/// that may be an image and cannot be read.
///
/// # Errors
///
/// When the directory cannot be read.
pub(crate) fn find_images(folder: &Path) -> anyhow::Result<Vec<FoundFile>> {
    let mut found = files::below(folder)?.files;
    found.retain(FoundFile::may_be_image);
    Ok(found)
}

/// Keeps at most `n` elements, evenly spread.
pub(crate) fn sample<T>(all: Vec<T>, n: usize) -> Vec<T> {
    let total = all.len();
    if total <= n {
        return all;
    }
    let mut chosen = (0..n).map(|idx| idx * total / n).peekable();
    let numbered = all.into_iter().enumerate();
    numbered
        .filter_map(|(idx, one)| chosen.next_if_eq(&idx).map(|_| one))
        .collect()
}

/// Expands an input: a file is itself, a directory the images in it.
fn expand(path: PathBuf) -> VecDeque<Result<Source, CallImage>> {
    if !path.is_dir() {
        return VecDeque::from([Ok(Source::File(path))]);
    }
    match find_images(&path) {
        Ok(found) if found.is_empty() => {
            let name = path.display().to_string();
            VecDeque::from([Err(CallImage::failed(
                name,
                "this directory has no images".to_owned(),
            ))])
        }
        Ok(found) => {
            let source = |found: files::FoundFile| match found.file {
                Ok(_) => Ok(Source::File(found.path)),
                Err(trouble) => Err(CallImage::failed(
                    found.path.display().to_string(),
                    trouble.to_string(),
                )),
            };
            found.into_iter().map(source).collect()
        }
        Err(error) => {
            let name = path.display().to_string();
            VecDeque::from([Err(CallImage::failed(name, format!("{error:#}")))])
        }
    }
}

/// Reads the paths of a list, one per line; a path need not be UTF-8.
fn lines(
    list: &Path,
) -> anyhow::Result<impl Iterator<Item = Result<PathBuf, CallImage>> + Send + use<>> {
    let name = list.display().to_string();
    let reader: Box<dyn Read + Send> = if list == Path::new(STDIN) {
        Box::new(io::stdin())
    } else {
        let file = File::open(list).with_context(|| format!("cannot read --list {name}"))?;
        Box::new(file)
    };
    let lines = BufReader::new(reader).split(b'\n');
    Ok(lines.filter_map(move |line| match line {
        Ok(mut line) => {
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            (!line.is_empty()).then(|| Ok(OsString::from_vec(line).into()))
        }
        Err(error) => Some(Err(CallImage::failed(name.clone(), error.to_string()))),
    }))
}

impl Source {
    fn read(self, bytes_max: u64) -> CallImage {
        let (name, read) = match self {
            Self::Stdin => {
                let read = read(&mut io::stdin().lock(), bytes_max);
                (STDIN.to_owned(), read.map(Ok))
            }
            Self::File(path) => (path.display().to_string(), files::read(&path, bytes_max)),
        };
        let bytes = match read {
            Ok(Ok(Some(bytes))) => Ok(bytes.into()),
            Ok(Ok(None)) => Err(format!(
                "the image is over the worker's limit of {} per image (--image-bytes-max, \
                 --request-bytes-max)",
                ByteSize(bytes_max)
            )),
            Ok(Err(trouble @ Trouble::Special)) => Err(format!(
                "{trouble}; to read a pipe, redirect it to standard input and give -"
            )),
            Ok(Err(trouble)) => Err(trouble.to_string()),
            Err(error) => Err(error.to_string()),
        };
        CallImage { name, bytes }
    }
}

/// Reads at most `bytes_max` bytes; `None` if the input has more.
fn read(input: &mut impl Read, bytes_max: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    input.take(bytes_max + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= bytes_max).then_some(bytes))
}

impl CallImage {
    fn failed(name: String, reason: String) -> Self {
        Self {
            name,
            bytes: Err(reason),
        }
    }
}

/// Batch of images for one call, with the failed images between them.
#[derive(Debug)]
pub(super) struct CallBatch(Vec<CallImage>);

impl CallBatch {
    pub(super) fn images(&self) -> Vec<Bytes> {
        let read = |item: &CallImage| item.bytes.as_ref().ok().cloned();
        self.0.iter().filter_map(read).collect()
    }

    /// Pairs each image's name with its outcome. `outcomes` has one element for
    /// each of [`Self::images`].
    pub(super) fn answered<T>(
        self,
        outcomes: Vec<Result<T, String>>,
    ) -> Vec<(String, Result<T, String>)> {
        let mut outcomes = outcomes.into_iter();
        let answered = self.0.into_iter().map(|item| {
            let outcome = match item.bytes {
                Ok(_) => outcomes
                    .next()
                    .unwrap_or_else(|| Err("the worker sent no answer for this image".to_owned())),
                Err(reason) => Err(reason),
            };
            (item.name, outcome)
        });
        answered.collect()
    }
}

/// Iterator that cuts images into batches within the limits.
struct Batches<I> {
    items: I,
    /// Image for which the last batch had no room.
    next: Option<CallImage>,
    limits: CallLimits,
}

impl<I: Iterator<Item = CallImage>> Iterator for Batches<I> {
    type Item = CallBatch;

    fn next(&mut self) -> Option<CallBatch> {
        let mut batch = Vec::new();
        let mut n_bytes = 0;
        while batch.len() < self.limits.images {
            let Some(item) = self.next.take().or_else(|| self.items.next()) else {
                break;
            };
            let size = item.bytes.as_ref().map_or(0, Bytes::len) as u64 + IMAGE_OVERHEAD;
            if n_bytes + size > self.limits.bytes && !batch.is_empty() {
                self.next = Some(item);
                break;
            }
            n_bytes += size;
            batch.push(item);
        }
        (!batch.is_empty()).then_some(CallBatch(batch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> CallLimits {
        CallLimits {
            images: 3,
            bytes: 100,
            image_bytes: 90,
        }
    }

    #[test]
    fn calls_are_within_the_limits_and_in_order() {
        let item = |(idx, size): (usize, &usize)| CallImage {
            name: idx.to_string(),
            bytes: match size {
                0 => Err("bad".to_owned()),
                size => Ok(vec![0; *size].into()),
            },
        };
        // Each image takes 16 bytes more than its content.
        let sizes = [10, 10, 10, 10, 60, 8, 84, 200, 0, 1];
        let items = sizes.iter().enumerate().map(item);
        let batches = Batches {
            items,
            next: None,
            limits: limits(),
        };
        let names = batches.map(|CallBatch(items)| {
            let names: Vec<String> = items.into_iter().map(|item| item.name).collect();
            names.join(" ")
        });
        let names: Vec<String> = names.collect();
        assert_eq!(names, ["0 1 2", "3", "4 5", "6", "7", "8 9"]);
    }

    #[test]
    fn outcomes_find_their_images() {
        let bytes = Bytes::from_static(b"image");
        let good = |name: &str| CallImage {
            name: name.to_owned(),
            bytes: Ok(bytes.clone()),
        };
        let bad = CallImage::failed("b".to_owned(), "unread".to_owned());
        let batch = CallBatch(vec![good("a"), bad, good("c"), good("d")]);
        assert_eq!(batch.images().len(), 3);
        let answered = batch.answered(vec![Ok(1), Err("refused".to_owned())]);
        let reason = |text: &str| Err(text.to_owned());
        let expected = [
            ("a".to_owned(), Ok(1)),
            ("b".to_owned(), reason("unread")),
            ("c".to_owned(), reason("refused")),
            (
                "d".to_owned(),
                reason("the worker sent no answer for this image"),
            ),
        ];
        assert_eq!(answered, expected);
    }

    #[test]
    fn a_call_is_a_run_of_the_model_or_less() {
        let limits = pb::Limits {
            images_per_call_max: 256,
            request_bytes_max: 1 << 20,
            image_bytes_max: 1 << 25,
            images_in_flight_max: 1024,
            batch_size_max: 8,
            ..Default::default()
        };
        let got = CallLimits::new(&limits);
        assert_eq!(got.images, 8);
        assert!(got.image_bytes + IMAGE_OVERHEAD + MESSAGE_OVERHEAD <= 1 << 20);
        let few = pb::Limits {
            images_in_flight_max: 2,
            ..limits
        };
        assert_eq!(CallLimits::new(&few).images, 2);
        // A worker that reports no limits gets one image per call.
        assert_eq!(CallLimits::new(&pb::Limits::default()).images, 1);
    }

    #[test]
    fn files_are_read_up_to_the_limit() {
        assert_eq!(read(&mut &[1_u8; 9][..], 9).unwrap().unwrap().len(), 9);
        assert_eq!(read(&mut &[1_u8; 10][..], 9).unwrap(), None);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("10.png");
        std::fs::write(&path, [1; 10]).unwrap();
        let error = Source::File(path).read(9).bytes.unwrap_err();
        assert!(error.contains("9 B per image"), "{error}");
        let error = Source::File("/dev/zero".into()).read(9).bytes.unwrap_err();
        assert!(error.contains("neither a file nor a directory"), "{error}");
    }

    #[test]
    fn lists_folders_and_files_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(path("in/deep")).unwrap();
        std::fs::create_dir(path("empty")).unwrap();
        for name in ["in/b.png", "in/a.JPG", "in/deep/c.webp", "in/notes.txt"] {
            std::fs::write(path(name), b"").unwrap();
        }
        let list =
            [path("empty"), path("in"), path("none.png")].map(|path| path.display().to_string());
        std::fs::write(
            path("list"),
            format!("{}\r\n\n{}\n{}", list[0], list[1], list[2]),
        )
        .unwrap();
        let config = InputConfig {
            inputs: vec![STDIN.into(), path("in/notes.txt")],
            list: Some(path("list")),
        };
        let found: Vec<String> = Inputs::new(&config)
            .unwrap()
            .sources
            .map(|source| match source {
                Ok(Source::Stdin) => "stdin".to_owned(),
                Ok(Source::File(found)) => {
                    let inside = found.strip_prefix(folder.path()).unwrap();
                    inside.display().to_string()
                }
                Err(item) => item.bytes.unwrap_err(),
            })
            .collect();
        let expected = [
            "stdin",
            "in/notes.txt",
            "this directory has no images",
            "in/a.JPG",
            "in/b.png",
            "in/deep/c.webp",
            "none.png",
        ];
        assert_eq!(found, expected);
        let config = InputConfig {
            inputs: vec![STDIN.into()],
            list: Some(STDIN.into()),
        };
        assert!(config.validate().is_err());
    }

    #[test]
    fn a_sample_is_spread_evenly() {
        let paths = |n: usize| {
            (0..n)
                .map(|i| PathBuf::from(i.to_string()))
                .collect::<Vec<_>>()
        };
        let names = |paths: Vec<PathBuf>| {
            paths
                .iter()
                .map(|p| p.display().to_string())
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(names(sample(paths(10), 3)), "0 3 6");
        assert_eq!(names(sample(paths(2), 3)), "0 1");
    }
}
