//! `imagegpt classify`: the most likely classes of images.

use std::io::Write;
use std::str::FromStr;

use clap::Args;
use serde::Serialize;

use super::input::{ALPHA_HELP, FIT_HELP};
use super::output::json;
use super::{CommandOutcome, EachConfig, Session};
use crate::client::{Classes, Client};
use crate::files::printable;
use crate::model::head::HeadFlag;
use crate::proto::pb;
use crate::serve::config::ServeConfig;

/// Width of the class column in the table; a longer name shifts the columns
/// after it.
const LABEL_WIDTH_MAX: usize = 24;

#[derive(Debug, Clone, Args)]
#[command(
    mut_arg("fit", |arg| arg.help(FIT_HELP).long_help(None)),
    mut_arg("alpha", |arg| arg.help(ALPHA_HELP).long_help(None))
)]
pub struct ClassifyArgs {
    /// Linear head to use: the NAME of a head that the worker serves, or, with
    /// --model, NAME=FILE to load one [default: the checkpoint's own head, or
    /// the only head]
    #[arg(long, value_name = "NAME[=FILE]")]
    pub head: Option<HeadChoice>,

    /// Number of classes to show per image
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub top_k: u32,

    #[command(flatten)]
    pub each: EachConfig,
}

/// Value of `--head`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeadChoice {
    /// Name of a head that the worker serves.
    Name(String),
    /// Head that a worker in this process loads.
    File(HeadFlag),
}

impl FromStr for HeadChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // A name has no '=', so a text with one must be NAME=FILE as a whole.
        if text.contains('=') {
            return text.parse().map(Self::File);
        }
        Ok(Self::Name(text.to_owned()))
    }
}

impl HeadChoice {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Name(name) => name,
            Self::File(flag) => &flag.name,
        }
    }
}

impl HeadChoice {
    /// Adds the head to the flags of a worker in this process.
    pub(super) fn add_to(&self, own: Option<&mut ServeConfig>) -> anyhow::Result<()> {
        let Self::File(flag) = self else {
            return Ok(());
        };
        let Some(own) = own else {
            anyhow::bail!(
                "--head {}={}: a worker at --endpoint loads no files; use --head {} for a head \
                 that it serves, or serve the model in this process (--model)",
                flag.name,
                flag.file.display(),
                flag.name
            );
        };
        own.model.heads.push(flag.clone());
        Ok(())
    }
}

#[derive(Serialize)]
struct Line<'a> {
    file: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    head: &'a str,
    classes: Vec<Class>,
    /// Logits of a model that names no classes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    logits: Vec<f32>,
    model_digest: &'a str,
}

#[derive(Debug, Serialize)]
struct Class {
    index: u32,
    label: String,
    score: f32,
}

pub(super) async fn run(
    args: &ClassifyArgs,
    session: &Session,
    out: &mut impl Write,
) -> anyhow::Result<CommandOutcome> {
    let (head, top_k) = (args.head.as_ref().map_or("", HeadChoice::name), args.top_k);
    let call = |mut client: Client, images, preprocess| async move {
        client.classify(images, preprocess, head, top_k).await
    };
    let width = label_width(session, head);
    // The header is as wide as the columns below it.
    let column = format!("score {:width$}  ", "class");
    let header = column.repeat(columns(session, head, top_k)) + "file";
    session.head(&args.each, &header, out)?;
    let take = |file: &str, found: Classes| {
        let classes = found.best.into_iter().map(|class| Class {
            index: class.index,
            label: class.label,
            score: class.score,
        });
        let line = Line {
            file,
            head: &found.head,
            classes: classes.collect(),
            logits: found.logits,
            model_digest: &session.model.digest,
        };
        if args.each.json {
            return json(out, &line);
        }
        for class in &line.classes {
            write!(out, "{:.3} {:width$}  ", class.score, class.label)?;
        }
        for (index, logit) in best(&line.logits, top_k) {
            write!(out, "{logit:5.2} {:width$}  ", format!("#{index}"))?;
        }
        writeln!(out, "{}", printable(file))?;
        Ok(())
    };
    session.each_input(&args.each, call, take).await
}

/// Names of the classes that can be shown; empty for a model without names.
fn labels<'a>(session: &'a Session, head: &str) -> &'a [String] {
    let heads = &session.model.heads;
    let found = heads.iter().find(|found| found.name == head);
    // Without a name, the checkpoint's own head or the only head answers; older
    // workers do not say which.
    let default = &session.model.head_default;
    let found = found.or_else(|| {
        let is_default = |found: &&pb::Head| head.is_empty() && found.name == *default;
        heads.iter().find(is_default)
    });
    match (found, heads.as_slice()) {
        (Some(head), _) => &head.labels,
        (None, [only]) if session.model.labels.is_empty() => &only.labels,
        _ => &session.model.labels,
    }
}

fn label_width(session: &Session, head: &str) -> usize {
    let widths = labels(session, head)
        .iter()
        .map(|label| label.chars().count());
    widths
        .max()
        .unwrap_or(0)
        .clamp("class".len(), LABEL_WIDTH_MAX)
}

fn columns(session: &Session, head: &str, top_k: u32) -> usize {
    let top_k = top_k as usize;
    match labels(session, head).len() {
        0 => top_k,
        n => top_k.min(n),
    }
}

/// Returns the highest logits with their row numbers, for models that name no
/// classes.
fn best(logits: &[f32], top_k: u32) -> Vec<(usize, f32)> {
    let mut all: Vec<(usize, f32)> = logits.iter().copied().enumerate().collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    all.truncate(top_k as usize);
    all
}
