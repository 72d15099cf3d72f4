//! `imagegpt neighbors`: embeds a folder through a worker and shows, as a
//! table and as a picture, which images its features place together, and as
//! which class a linear head takes each.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use font8x8::{BASIC_FONTS, UnicodeFonts as _};
use image::{ImageFormat, Rgb, RgbImage, imageops};

use crate::client::{Classes, Client, ConnectConfig};
use crate::commands::{check_output, complain};
use crate::files::{self, FoundFile, printable};
use crate::imaging::DecodeBudget;
use crate::imaging::decode::decode;
use crate::imaging::{Alpha, ImageLimits};
use crate::proto::pb;

/// Embed a folder of images through a worker and show who looks like whom.
#[derive(Debug, Clone, Args)]
pub struct NeighborsConfig {
    /// Folder of images (PNG, JPEG, WebP, GIF, BMP, TIFF); its subfolders too
    pub folder: PathBuf,

    /// Where the worker listens
    #[arg(
        long,
        env = "IMAGEGPT_ENDPOINT",
        default_value = "http://127.0.0.1:50051"
    )]
    pub endpoint: String,

    #[command(flatten)]
    pub connect: ConnectConfig,

    /// Write a PNG with one row an image: the image, what the model sees of
    /// it, and its nearest neighbors
    #[arg(long, value_name = "FILE")]
    pub picture: Option<PathBuf>,

    /// Neighbors of each image
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub neighbors: u8,

    /// Images at most; of more, an even sample by name is taken
    #[arg(long, default_value_t = 48, value_parser = clap::value_parser!(u16).range(2..=4096))]
    pub images_max: u16,

    /// Show transparent pixels as white instead of the color stored under them
    #[arg(long)]
    pub white: bool,

    /// Classify too, by this linear head of the worker. An image whose folder
    /// is named like a class (only letters and digits count) is right or wrong
    #[arg(long, value_name = "NAME")]
    pub head: Option<String>,
}

/// Side of a picture's cells in pixels: twice the published models' 32, so
/// that palette pixels show.
const CELL: u32 = 64;
const GAP: u32 = 8;
/// Gap between the tokens' column and the neighbors' columns.
const WIDE_GAP: u32 = 24;
/// Height of a line of text, and of the two lines on top.
const LINE: u32 = 12;
const HEADER: u32 = GAP + 2 * LINE;
/// What decoding one image may cost this side.
pub(crate) const PICTURE_LIMITS: ImageLimits = ImageLimits {
    image_bytes_max: 64 << 20,
    image_pixels_max: 100_000_000,
    decode_bytes_max: 1 << 30,
};
const ROWS_PER_BLOCK: u32 = 16;

/// An image with all that is shown of it.
struct Item {
    name: String,
    encoded: Bytes,
    embedding: Vec<f32>,
    tokens: Vec<u32>,
    /// With `--head` only.
    class: Option<Class>,
}

/// What a head says of an image.
struct Class {
    label: String,
    score: f32,
    /// What the folder says, if it is one of the head's classes.
    truth: Option<String>,
}

impl Class {
    fn is_right(&self) -> Option<bool> {
        self.truth.as_ref().map(|truth| *truth == self.label)
    }
}

/// Runs the command, with its table going to `out` and what is left out to
/// standard error.
///
/// # Errors
///
/// When the folder or the worker cannot be read, or the picture not written.
pub async fn run(config: &NeighborsConfig, out: &mut impl Write) -> anyhow::Result<()> {
    if let Some(path) = &config.picture {
        check_output("--picture", path)?;
    }
    let paths = sample(images(config)?, config.images_max.into());
    anyhow::ensure!(
        paths.len() >= 2,
        "{} has {} images; neighbors need at least 2",
        config.folder.display(),
        paths.len()
    );
    let mut client = Client::connect(&config.endpoint, &config.connect).await?;
    let model = client.model().await?;
    writeln!(
        out,
        "model {} ({}), {} dimensions, on {}",
        model.name, model.digest, model.dimension, model.execution_provider
    )?;
    if !model.notice.is_empty() {
        writeln!(out, "notice: {}", model.notice)?;
    }
    let items = embed(config, &mut client, &model, &paths).await?;
    let nearest: Vec<Vec<(usize, f32)>> = (0..items.len())
        .map(|idx| nearest(&items, idx, config.neighbors.into()))
        .collect();
    table(&items, &nearest, out)?;
    share_right(&items, out)?;
    if let Some(path) = &config.picture {
        picture(&items, &nearest, &model)
            .save_with_format(path, ImageFormat::Png)
            .with_context(|| format!("--picture {} cannot be written", path.display()))?;
        writeln!(
            out,
            "wrote {}: image, its {}x{} tokens, then neighbors, nearest first",
            path.display(),
            model.side,
            model.side
        )?;
    }
    Ok(())
}

/// One row an image: its class, and its neighbors in columns with their cosine
/// similarity.
fn table(
    items: &[Item],
    nearest: &[Vec<(usize, f32)>],
    out: &mut impl Write,
) -> std::io::Result<()> {
    let longest = |texts: &mut dyn Iterator<Item = usize>| texts.max().unwrap_or(0);
    let width = longest(&mut items.iter().map(|item| item.name.chars().count()));
    let width = width.max("image".len());
    let classes: Vec<String> = items.iter().map(class_text).collect();
    let class_width = longest(&mut classes.iter().map(|class| class.chars().count()));
    let class_header = if class_width > 0 { "class" } else { "" };
    // Without classes there is no column for them, not even an empty one.
    let gap = if class_width > 0 { "  " } else { "" };
    writeln!(
        out,
        "{:width$}{gap}{class_header:class_width$}  nearest (cosine similarity)",
        "image"
    )?;
    for ((item, class), nearest) in items.iter().zip(&classes).zip(nearest) {
        use std::fmt::Write as _;
        let mut row = format!("{:width$}{gap}{class:class_width$}", item.name);
        for &(idx, similarity) in nearest {
            let _ = write!(row, "  {:width$} {similarity:.3}", items[idx].name);
        }
        writeln!(out, "{}", row.trim_end())?;
    }
    Ok(())
}

/// An image's class with its score; a wrong one is marked as such.
fn class_text(item: &Item) -> String {
    item.class.as_ref().map_or_else(String::new, |class| {
        let mark = match class.is_right() {
            Some(false) => " wrong",
            Some(true) | None => "",
        };
        format!("{} {:.2}{mark}", class.label, class.score)
    })
}

/// How many classes are those of the images' folders, if any folder is one.
fn share_right(items: &[Item], out: &mut impl Write) -> std::io::Result<()> {
    let verdicts: Vec<bool> = items
        .iter()
        .filter_map(|item| item.class.as_ref()?.is_right())
        .collect();
    if verdicts.is_empty() {
        return Ok(());
    }
    let n_right = verdicts.iter().filter(|&&right| right).count();
    writeln!(
        out,
        "{n_right} of {} classes are right, by the folders' names",
        verdicts.len()
    )
}

/// The class that an image's folder is named like, if there is one.
fn truth(path: &Path, labels: &[String]) -> Option<String> {
    let bare = |text: &str| -> String {
        let kept = text.chars().filter(|letter| letter.is_alphanumeric());
        kept.flat_map(char::to_lowercase).collect()
    };
    let folder = bare(&path.parent()?.file_name()?.to_string_lossy());
    labels.iter().find(|label| bare(label) == folder).cloned()
}

/// Every image below `folder`, by name, and what may be one and cannot be read.
///
/// # Errors
///
/// When the folder cannot be read.
pub(crate) fn find_images(folder: &Path) -> anyhow::Result<Vec<FoundFile>> {
    let mut found = files::below(folder)?;
    found.retain(FoundFile::may_be_image);
    Ok(found)
}

/// The images of a folder; what cannot be read is a line for the person.
fn images(config: &NeighborsConfig) -> anyhow::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for found in find_images(&config.folder)? {
        match found.file {
            Ok(_) => paths.push(found.path),
            Err(trouble) => {
                complain(&format!("{}: left out: {trouble}", found.path.display()));
            }
        }
    }
    Ok(paths)
}

/// `n` of the paths at most, evenly spread.
pub(crate) fn sample(paths: Vec<PathBuf>, n: usize) -> Vec<PathBuf> {
    let total = paths.len();
    if total <= n {
        return paths;
    }
    (0..n).map(|idx| paths[idx * total / n].clone()).collect()
}

async fn embed(
    config: &NeighborsConfig,
    client: &mut Client,
    model: &pb::GetModelResponse,
    paths: &[PathBuf],
) -> anyhow::Result<Vec<Item>> {
    let preprocess = pb::Preprocess {
        alpha: if config.white {
            pb::Alpha::White
        } else {
            pb::Alpha::Drop
        }
        .into(),
        ..Default::default()
    };
    let labels = head_labels(config, model)?;
    // Small calls keep both ends' memory small; a worker batches over calls.
    let per_call = model
        .limits
        .as_ref()
        .map_or(1, |limits| limits.images_per_call_max.clamp(1, 16));
    let mut items = Vec::with_capacity(paths.len());
    for paths in paths.chunks(per_call as usize) {
        let mut encoded = Vec::with_capacity(paths.len());
        for path in paths {
            let bytes = std::fs::read(path)
                .with_context(|| format!("{} cannot be read", path.display()))?;
            encoded.push(Bytes::from(bytes));
        }
        let embeddings = client.embed(encoded.clone(), preprocess).await?;
        let tokens = client.tokenize(encoded.clone(), preprocess).await?;
        let classes = match &config.head {
            Some(head) => {
                let found = client
                    .classify(encoded.clone(), preprocess, head, 1)
                    .await?;
                let best = |found: Result<Classes, String>| {
                    found.map(|found| found.best.into_iter().next())
                };
                found.into_iter().map(best).collect()
            }
            None => vec![Ok(None); paths.len()],
        };
        let answers = embeddings.into_iter().zip(tokens).zip(classes);
        for ((path, encoded), ((embedding, tokens), class)) in
            paths.iter().zip(encoded).zip(answers)
        {
            let name = path
                .file_stem()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            let name = printable(&name).into_owned();
            match (embedding, tokens, class) {
                (Ok(embedding), Ok(tokens), Ok(class)) => items.push(Item {
                    name,
                    encoded,
                    embedding,
                    tokens,
                    class: class.map(|class| Class {
                        label: class.label,
                        score: class.score,
                        truth: truth(path, &labels),
                    }),
                }),
                (Err(reason), ..) | (_, Err(reason), _) | (.., Err(reason)) => {
                    complain(&format!("{}: left out: {reason}", path.display()));
                }
            }
        }
    }
    Ok(items)
}

/// The classes of the head that `--head` names; none without the flag.
fn head_labels(
    config: &NeighborsConfig,
    model: &pb::GetModelResponse,
) -> anyhow::Result<Vec<String>> {
    let Some(name) = &config.head else {
        return Ok(Vec::new());
    };
    let head = model.heads.iter().find(|head| head.name == *name);
    let head = head.with_context(|| {
        let names: Vec<&str> = model.heads.iter().map(|head| head.name.as_str()).collect();
        format!("--head {name}: the worker has no such head; it has {names:?}")
    })?;
    Ok(head.labels.clone())
}

/// The items most like `items[of]`, by cosine similarity (embeddings come
/// with length 1), best first.
fn nearest(items: &[Item], of: usize, n: usize) -> Vec<(usize, f32)> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let mut others: Vec<(usize, f32)> = items
        .iter()
        .enumerate()
        .filter(|&(idx, _)| idx != of)
        .map(|(idx, item)| (idx, dot(&items[of].embedding, &item.embedding)))
        .collect();
    others.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    others.truncate(n);
    others
}

fn picture(
    items: &[Item],
    nearest: &[Vec<(usize, f32)>],
    model: &pb::GetModelResponse,
) -> RgbImage {
    let n_neighbors = to_u32(nearest.iter().map(Vec::len).max().unwrap_or(0));
    // Side by side in blocks, so that the sheet is no ribbon.
    let n_blocks = to_u32(items.len()).div_ceil(ROWS_PER_BLOCK);
    let n_rows = to_u32(items.len()).div_ceil(n_blocks.max(1));
    let block_width = (2 + n_neighbors) * (CELL + GAP) + 2 * WIDE_GAP;
    let mut sheet = RgbImage::from_pixel(
        GAP + n_blocks * block_width - WIDE_GAP.min(n_blocks * block_width),
        HEADER + GAP + n_rows * (CELL + GAP),
        Rgb([255; 3]),
    );
    // A picture travels without its table, so it says itself what it shows.
    write_line(
        &mut sheet,
        0,
        &format!("{} - image, tokens, neighbors", model.name),
    );
    write_line(&mut sheet, 1, &model.notice);
    let thumbnails: Vec<RgbImage> = items.iter().map(thumbnail).collect();
    for (idx, (item, nearest)) in items.iter().zip(nearest).enumerate() {
        let (block, row) = (to_u32(idx) / n_rows, to_u32(idx) % n_rows);
        let tokens = imageops::resize(
            &from_tokens(item, model),
            CELL,
            CELL,
            imageops::FilterType::Nearest,
        );
        let neighbors = nearest.iter().map(|&(idx, _)| &thumbnails[idx]);
        let cells = [&thumbnails[idx], &tokens].into_iter().chain(neighbors);
        for (column, cell) in (0..).zip(cells) {
            let gap = if column >= 2 { WIDE_GAP } else { 0 };
            let x = GAP + block * block_width + column * (CELL + GAP) + gap;
            let y = HEADER + GAP + row * (CELL + GAP);
            imageops::replace(&mut sheet, cell, x.into(), y.into());
        }
    }
    sheet
}

/// One line of 8 x 8 letters in the header; what does not fit is cut off.
fn write_line(sheet: &mut RgbImage, line: u32, text: &str) {
    for (column, letter) in (0..).zip(text.chars()) {
        let Some(glyph) = BASIC_FONTS.get(letter) else {
            continue;
        };
        for (dy, bits) in (0..).zip(glyph) {
            for dx in (0..8).filter(|dx| bits >> dx & 1 == 1) {
                let (x, y) = (GAP + column * 8 + dx, GAP + line * LINE + dy);
                if let Some(pixel) = sheet.get_pixel_mut_checked(x, y) {
                    *pixel = Rgb([60; 3]);
                }
            }
        }
    }
}

fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// The image itself, small, on white. Only the worker's verdict decides
/// whether an image is good; one that cannot be drawn here shows as grey.
fn thumbnail(item: &Item) -> RgbImage {
    let decoded = decode(
        &item.encoded,
        Alpha::White,
        &PICTURE_LIMITS,
        &DecodeBudget::endless(),
    )
    .ok();
    decoded
        .and_then(|image| RgbImage::from_raw(image.width, image.height, image.pixels))
        .map_or_else(
            || RgbImage::from_pixel(CELL, CELL, Rgb([200; 3])),
            |image| imageops::resize(&image, CELL, CELL, imageops::FilterType::Triangle),
        )
}

/// What the model sees: each token in its palette's color.
fn from_tokens(item: &Item, model: &pb::GetModelResponse) -> RgbImage {
    RgbImage::from_fn(model.side, model.side, |x, y| {
        let token = item.tokens.get((y * model.side + x) as usize).copied();
        let color = token.and_then(|token| {
            let start = token as usize * 3;
            model.palette_rgb8.get(start..start + 3)
        });
        color.map_or(Rgb([0; 3]), |color| Rgb([color[0], color[1], color[2]]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(embedding: &[f32]) -> Item {
        Item {
            name: String::new(),
            encoded: Bytes::new(),
            embedding: embedding.to_vec(),
            tokens: vec![1, 0, 0, 1],
            class: None,
        }
    }

    #[test]
    fn the_nearest_comes_first_and_never_the_image_itself() {
        let items = [item(&[1.0, 0.0]), item(&[0.0, 1.0]), item(&[0.6, 0.8])];
        let order = |of| {
            nearest(&items, of, 9)
                .iter()
                .map(|n| n.0)
                .collect::<Vec<_>>()
        };
        assert_eq!(order(0), [2, 1]);
        assert_eq!(order(1), [2, 0]);
        assert_eq!(nearest(&items, 2, 1), [(1, 0.8)]);
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

    #[test]
    fn a_folder_named_like_a_class_is_the_truth() {
        let labels = ["Food & Drink".to_owned(), "Flags".to_owned()];
        let truth = |path: &str| truth(Path::new(path), &labels);
        assert_eq!(
            truth("pictures/food-drink/bread.png").as_deref(),
            Some("Food & Drink")
        );
        assert_eq!(truth("Flags/is.png").as_deref(), Some("Flags"));
        assert_eq!(truth("pictures/bread.png"), None);
        assert_eq!(truth("bread.png"), None);
    }

    #[test]
    fn classes_stand_in_the_table_and_are_counted() {
        let mut items = [item(&[1.0, 0.0]), item(&[0.0, 1.0])];
        let print = |items: &[Item]| {
            let mut out = Vec::new();
            table(items, &[vec![], vec![]], &mut out).unwrap();
            share_right(items, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        items[0].name = "flag".to_owned();
        items[1].name = "bread".to_owned();
        assert_eq!(
            print(&items),
            "image  nearest (cosine similarity)\nflag\nbread\n"
        );
        for (item, truth) in items.iter_mut().zip(["Flags", "Food"]) {
            item.class = Some(Class {
                label: "Flags".to_owned(),
                score: 0.5,
                truth: Some(truth.to_owned()),
            });
        }
        assert_eq!(
            print(&items),
            "image  class             nearest (cosine similarity)\n\
             flag   Flags 0.50\n\
             bread  Flags 0.50 wrong\n\
             1 of 2 classes are right, by the folders' names\n"
        );
    }

    #[test]
    fn tokens_are_drawn_in_palette_colors() {
        let model = pb::GetModelResponse {
            side: 2,
            palette_rgb8: vec![1, 2, 3, 4, 5, 6].into(),
            ..Default::default()
        };
        let drawn = from_tokens(&item(&[]), &model);
        assert_eq!(drawn.get_pixel(0, 0), &Rgb([4, 5, 6]));
        assert_eq!(drawn.get_pixel(1, 0), &Rgb([1, 2, 3]));
    }
}
