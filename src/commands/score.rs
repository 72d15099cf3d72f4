//! `imagegpt score`: the likelihood of images under the model.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use plotters::style::colors::colormaps::ViridisRGB;
use serde::Serialize;

use super::output::{Folder, json};
use super::{CommandOutcome, EachConfig, Session};
use crate::client::{Client, Score, ScoreOptions};
use crate::files::printable;

#[derive(Debug, Clone, Args)]
pub struct ScoreArgs {
    /// Also show the complexity of each image: the size of its tokens when
    /// compressed without the model, in bits per token. A complex image is
    /// unlikely even if it is normal
    #[arg(long)]
    pub complexity: bool,

    /// Write a PNG file for each image into this directory that shows how
    /// unlikely each pixel is: from dark (certain) to yellow (as unlikely as a
    /// random color, or more)
    #[arg(long, value_name = "DIR")]
    pub map: Option<PathBuf>,

    /// Side of a model pixel in the maps, in pixels, without smoothing
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
    pub scale: u8,

    /// Print the least likely images first, once all are scored, instead of in
    /// the order of the inputs
    #[arg(long)]
    pub sort: bool,

    #[command(flatten)]
    pub each: EachConfig,
}

#[derive(Debug, Serialize)]
struct Line<'a> {
    file: String,
    nats_per_token: f64,
    bits_per_token: f64,
    nats: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    complexity_bits_per_token: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    map: Option<PathBuf>,
    model_digest: &'a str,
}

pub(super) async fn run(
    args: &ScoreArgs,
    session: &Session,
    out: &mut impl Write,
) -> anyhow::Result<CommandOutcome> {
    let options = ScoreOptions {
        map: args.map.is_some(),
        complexity: args.complexity,
    };
    let map = args.map.as_deref();
    let mut folder = map.map(|path| Folder::make("--map", path)).transpose()?;
    let call = |mut client: Client, images, preprocess| async move {
        client.score(images, preprocess, options).await
    };
    let mut sorted = Vec::new();
    // The file stands last, so that its width need not be known before all
    // images are scored.
    let complexity = if args.complexity { "  complexity" } else { "" };
    let columns = format!("nats/token  bits/token       nats{complexity}  file");
    session.head(&args.each, &columns, out)?;
    let take = |file: &str, score: Score| {
        let map = match &mut folder {
            Some(folder) => Some(folder.write(file, &session.heat(&score.map, args.scale)?)?),
            None => None,
        };
        let line = Line {
            file: file.to_owned(),
            nats_per_token: score.nats_per_token,
            bits_per_token: score.bits_per_token,
            nats: score.nats,
            complexity_bits_per_token: score.complexity_bits_per_token,
            map,
            model_digest: &session.model.digest,
        };
        if args.sort {
            sorted.push(line);
            return Ok(());
        }
        show(args, &line, out)
    };
    let outcome = session.each_input(&args.each, call, take).await?;
    sorted.sort_by(|a, b| b.nats_per_token.total_cmp(&a.nats_per_token));
    for line in &sorted {
        show(args, line, out)?;
    }
    Ok(outcome)
}

fn show(args: &ScoreArgs, line: &Line<'_>, out: &mut impl Write) -> anyhow::Result<()> {
    if args.each.json {
        return json(out, line);
    }
    let complexity = match line.complexity_bits_per_token {
        Some(bits) => format!("  {bits:>10.4}"),
        None => String::new(),
    };
    let Line {
        nats_per_token,
        bits_per_token,
        nats,
        file,
        ..
    } = line;
    let file = printable(file);
    writeln!(
        out,
        "{nats_per_token:>10.4}  {bits_per_token:>10.4}  {nats:>9.1}{complexity}  {file}"
    )?;
    Ok(())
}

impl Session {
    /// Draws the nats of each pixel as a PNG file. All maps of a model have the
    /// same color scale, so that they can be compared: from 0 to the nats of a
    /// random guess among all colors.
    fn heat(&self, nats: &[f32], scale: u8) -> anyhow::Result<Vec<u8>> {
        let n_colors = u16::try_from(self.model.palette_rgb8.len() / 3).unwrap_or(u16::MAX);
        let chance = f32::from(n_colors.max(2)).ln();
        let color = |&nats: &f32| {
            let color = ViridisRGB::get_color_normalized(nats, 0.0, chance);
            [color.0, color.1, color.2]
        };
        let side = self.model.side;
        let pixels = nats.iter().flat_map(color).collect();
        let map = image::RgbImage::from_raw(side, side, pixels)
            .ok_or_else(|| anyhow::anyhow!("the worker sent a map of the wrong size"))?;
        let edge = side * u32::from(scale);
        let map = image::imageops::resize(&map, edge, edge, image::imageops::FilterType::Nearest);
        let mut file = std::io::Cursor::new(Vec::new());
        map.write_to(&mut file, image::ImageFormat::Png)?;
        Ok(file.into_inner())
    }
}
