//! Command `imagegpt neighbors`: embeds images and shows, as a table and as a
//! picture, the images that are nearest to each by their features, and the
//! class that a linear head gives each.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use font8x8::{BASIC_FONTS, UnicodeFonts as _};
use image::{ImageFormat, Rgb, RgbImage, imageops};
use serde::Serialize;

use super::classify::HeadChoice;
use super::input::{ALPHA_HELP, FIT_HELP, Inputs};
use super::output::{json, stem};
use super::{CommandOutcome, EachConfig, Session};
use crate::client::{Classes, Client};
use crate::commands::{check_output, complain};
use crate::files::printable;
use crate::imaging::decode::decode;
use crate::imaging::{Alpha, DecodeBudget, ImageLimits};
use crate::proto::pb;

#[derive(Debug, Clone, Args)]
#[command(
    mut_arg("fit", |arg| arg.help(FIT_HELP).long_help(None)),
    mut_arg("alpha", |arg| arg.help(ALPHA_HELP).long_help(None))
)]
pub struct NeighborsArgs {
    /// Write a PNG with one row per image: the image, its tokens as the model
    /// sees them, and its nearest neighbors
    #[arg(long, value_name = "FILE")]
    pub picture: Option<PathBuf>,

    /// Number of neighbors to show for each image
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub neighbors: u8,

    /// Largest number of images; of more images an even sample in the inputs'
    /// order is taken
    #[arg(long, default_value_t = 48, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=4096))]
    pub images_max: u16,

    /// Also classify with a linear head: NAME is a head of the worker, or with
    /// --model NAME=FILE loads one. An image in a directory that is named like
    /// a class (only letters and digits count) is marked as right or wrong
    #[arg(long, value_name = "NAME[=FILE]")]
    pub head: Option<HeadChoice>,

    #[command(flatten)]
    pub each: EachConfig,
}

impl NeighborsArgs {
    /// Checks the rules that clap cannot check.
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        self.each.input.validate()?;
        let picture = self.picture.as_deref();
        picture.map_or(Ok(()), |path| check_output("--picture", path))
    }
}

/// Side of a picture's cells in pixels: twice the 32 of the published models,
/// so that pixels of the palette are visible.
const CELL: u32 = 64;
const GAP: u32 = 8;
/// Gap between the tokens' column and the neighbors' columns.
const WIDE_GAP: u32 = 24;
/// Height of a line of text, and of the header's two lines.
const LINE: u32 = 12;
const HEADER: u32 = GAP + 2 * LINE;
/// Limits of decoding one image in this process.
pub(crate) const PICTURE_LIMITS: ImageLimits = ImageLimits {
    image_bytes_max: 64 << 20,
    image_pixels_max: 100_000_000,
    decode_bytes_max: 1 << 30,
};
const ROWS_PER_BLOCK: u32 = 16;

/// Image with everything that is shown of it.
struct Item {
    file: String,
    /// Name of the image in the table.
    name: String,
    encoded: Bytes,
    embedding: Vec<f32>,
    tokens: Vec<u32>,
    /// Set only with `--head`.
    class: Option<Class>,
}

/// Class that a head gives an image.
struct Class {
    label: String,
    score: f32,
    /// Class by the name of the image's directory, if that is one of the head's
    /// classes.
    truth: Option<String>,
}

impl Class {
    fn is_right(&self) -> Option<bool> {
        self.truth.as_ref().map(|truth| *truth == self.label)
    }
}

#[derive(Serialize)]
struct Line<'a> {
    file: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    class: Option<ClassLine<'a>>,
    /// Neighbors, nearest first.
    neighbors: Vec<Neighbor<'a>>,
    model_digest: &'a str,
}

#[derive(Serialize)]
struct ClassLine<'a> {
    label: &'a str,
    score: f32,
    /// True if the directory is named like the class; `None` if it is named
    /// like none of the head's classes.
    #[serde(skip_serializing_if = "Option::is_none")]
    right: Option<bool>,
}

#[derive(Serialize)]
struct Neighbor<'a> {
    file: &'a str,
    /// Cosine of the angle between the embeddings.
    similarity: f32,
}

pub(super) async fn run(
    args: &NeighborsArgs,
    session: &Session,
    out: &mut impl Write,
) -> anyhow::Result<CommandOutcome> {
    let (items, outcome) = embed(args, session).await?;
    if items.len() < 2 {
        let text = format!(
            "images that have an answer: {}; neighbors need at least 2",
            items.len()
        );
        anyhow::ensure!(outcome == CommandOutcome::Failed, text);
        complain(&text);
        return Ok(outcome);
    }
    let nearest: Vec<Vec<(usize, f32)>> = (0..items.len())
        .map(|idx| nearest(&items, idx, args.neighbors.into()))
        .collect();
    // The picture is written first, since printing may fail when nobody reads.
    if let Some(path) = &args.picture {
        picture(&items, &nearest, &session.model)
            .save_with_format(path, ImageFormat::Png)
            .with_context(|| format!("--picture {} cannot be written", path.display()))?;
    }
    if args.each.json {
        lines(&items, &nearest, &session.model.digest, out)?;
        return Ok(outcome);
    }
    session.introduce_with(&format!(", {} dimensions", session.model.dimension), out)?;
    table(&items, &nearest, out)?;
    share_right(&items, out)?;
    if let Some(path) = &args.picture {
        let side = session.model.side;
        writeln!(
            out,
            "wrote {}: image, its {side}x{side} tokens, then neighbors, nearest first",
            path.display()
        )?;
    }
    Ok(outcome)
}

/// Prints one JSON object per image.
fn lines(
    items: &[Item],
    nearest: &[Vec<(usize, f32)>],
    model_digest: &str,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    for (item, nearest) in items.iter().zip(nearest) {
        let class = item.class.as_ref().map(|class| ClassLine {
            label: &class.label,
            score: class.score,
            right: class.is_right(),
        });
        let neighbors = nearest.iter().map(|&(idx, similarity)| Neighbor {
            file: &items[idx].file,
            similarity,
        });
        let line = Line {
            file: &item.file,
            class,
            neighbors: neighbors.collect(),
            model_digest,
        };
        json(out, &line)?;
    }
    Ok(())
}

/// Prints one row per image: its class, and its neighbors in columns with their
/// cosine similarity.
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

/// Formats an image's class with its score; a wrong class is marked.
fn class_text(item: &Item) -> String {
    item.class.as_ref().map_or_else(String::new, |class| {
        let mark = match class.is_right() {
            Some(false) => " wrong",
            Some(true) | None => "",
        };
        format!("{} {:.2}{mark}", class.label, class.score)
    })
}

/// Prints how many classes match the names of the images' directories, if any
/// directory is named like a class.
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
        "{n_right} of {} classes are right by the names of the directories",
        verdicts.len()
    )
}

/// Returns the class that an image's directory is named like, if there is one.
fn truth(path: &Path, labels: &[String]) -> Option<String> {
    let bare = |text: &str| -> String {
        let kept = text.chars().filter(|letter| letter.is_alphanumeric());
        kept.flat_map(char::to_lowercase).collect()
    };
    let folder = bare(&path.parent()?.file_name()?.to_string_lossy());
    labels.iter().find(|label| bare(label) == folder).cloned()
}

/// Collects the worker's answers for all images that the worker accepts.
async fn embed(
    args: &NeighborsArgs,
    session: &Session,
) -> anyhow::Result<(Vec<Item>, CommandOutcome)> {
    let found = head(args, session)?;
    let labels = found.map_or(&[][..], |head| &head.labels);
    // Features and tokens are of the images as the head sees them.
    let preprocess = args.each.preprocess.with_head(found);
    let head = args.head.as_ref().map(HeadChoice::name);
    let call = |client, images| answers(client, images, preprocess, head);
    let mut items = Vec::new();
    let take = |file: &str, found: Answer| {
        items.push(Item {
            name: printable(&stem(file)).into_owned(),
            class: found.class.map(|class| Class {
                label: class.label,
                score: class.score,
                truth: truth(Path::new(file), labels),
            }),
            file: file.to_owned(),
            encoded: found.encoded,
            embedding: found.embedding,
            tokens: found.tokens,
        });
        Ok(())
    };
    let (inputs, n_max) = (Inputs::new(&args.each.input)?, args.images_max.into());
    // Blocking, since a list may come through a slow pipe.
    let inputs = tokio::task::spawn_blocking(move || inputs.sample(n_max)).await?;
    let outcome = session.each(inputs, call, take).await?;
    Ok((items, outcome))
}

/// Answers of the worker for one image.
struct Answer {
    encoded: Bytes,
    embedding: Vec<f32>,
    tokens: Vec<u32>,
    class: Option<pb::ClassScore>,
}

async fn answers(
    mut client: Client,
    images: Vec<Bytes>,
    preprocess: pb::Preprocess,
    head: Option<&str>,
) -> anyhow::Result<Vec<Result<Answer, String>>> {
    let embeddings = client.embed(images.clone(), preprocess).await?;
    let tokens = client.tokenize(images.clone(), preprocess).await?;
    let classes = match head {
        Some(head) => {
            let found = client.classify(images.clone(), preprocess, head, 1).await?;
            let best =
                |found: Result<Classes, String>| found.map(|found| found.best.into_iter().next());
            found.into_iter().map(best).collect()
        }
        None => vec![Ok(None); images.len()],
    };
    let all = images.into_iter().zip(embeddings).zip(tokens).zip(classes);
    let answer = |(((encoded, embedding), tokens), class)| {
        Ok(Answer {
            encoded,
            embedding: embedding?,
            tokens: tokens?,
            class: class?,
        })
    };
    Ok(all.map(answer).collect())
}

/// Returns the head that `--head` names; `None` without the flag.
fn head<'a>(args: &NeighborsArgs, session: &'a Session) -> anyhow::Result<Option<&'a pb::Head>> {
    let Some(name) = args.head.as_ref().map(HeadChoice::name) else {
        return Ok(None);
    };
    let heads = &session.model.heads;
    let head = heads.iter().find(|head| head.name == name);
    let head = head.with_context(|| {
        let names: Vec<&str> = heads.iter().map(|head| head.name.as_str()).collect();
        format!("--head {name}: the worker has no such head; its heads are {names:?}")
    })?;
    Ok(Some(head))
}

/// Returns the items that are most similar to `items[of]`, by cosine similarity
/// (embeddings have length 1), best first.
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
    // Rows stand side by side in blocks, so that the sheet is not one long
    // strip.
    let n_blocks = to_u32(items.len()).div_ceil(ROWS_PER_BLOCK);
    let n_rows = to_u32(items.len()).div_ceil(n_blocks.max(1));
    let block_width = (2 + n_neighbors) * (CELL + GAP) + 2 * WIDE_GAP;
    let mut sheet = RgbImage::from_pixel(
        GAP + n_blocks * block_width - WIDE_GAP.min(n_blocks * block_width),
        HEADER + GAP + n_rows * (CELL + GAP),
        Rgb([255; 3]),
    );
    // The picture may be passed on without its table, so its header says what
    // it shows.
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

/// Writes one line of 8 x 8 letters into the header; text that does not fit is
/// cut off.
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

/// Draws the image itself, small, on white. Only the worker decides whether an
/// image is good; an image that cannot be drawn here is shown as gray.
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

/// Draws the image as the model sees it: each token in its palette's color.
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
            file: String::new(),
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
             1 of 2 classes are right by the names of the directories\n"
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
