//! Commands that ask a worker about images: `imagegpt generate`, `score`,
//! `classify`, `tokenize` and `neighbors`.
//!
//! This module has the common parts: the choice of the worker, packing images
//! into calls that fit the worker's limits, and reporting images that fail.
//! Each command defines its request and the output of the answers.

pub mod bench;
mod classify;
pub mod cli;
pub mod compile;
pub mod completions;
mod contact_sheet;
pub mod doctor;
pub mod embed;
pub mod environment;
mod generate;
mod input;
pub mod loss;
mod neighbors;
mod output;
pub mod print;
pub mod probe;
mod score;
pub mod serve;
mod tokenize;
mod tokens;

use std::io::{ErrorKind, Write};
use std::pin::pin;

use bytes::Bytes;
use clap::{Args, Subcommand};
use futures_util::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

pub use self::classify::ClassifyArgs;
pub use self::generate::GenerateArgs;
use self::input::{CallBatch, CallLimits, Inputs};
pub use self::input::{InputConfig, PreprocessConfig};
pub use self::neighbors::NeighborsArgs;
pub(crate) use self::output::{check as check_output, complain};
pub use self::score::ScoreArgs;
use self::serve::{OwnWorker, OwnWorkerFlags};
pub use self::tokenize::TokenizeArgs;
use self::tokens::TokenFacts;
use crate::client::{CallError, Client, ConnectConfig};
use crate::model::{CallTask, ModelNeed};
use crate::proto::pb;
use crate::serve::config::ServeConfig;
use crate::telemetry;

/// Calls in flight per command: while one is answered and another is decoded,
/// the next is on its way.
const CALLS: usize = 4;
/// Log flags of a worker in this process: only errors, unless `--serve "--log
/// info"` asks for more.
const QUIET: [&str; 2] = ["--log", "error"];

/// Commands that ask a worker about images.
#[derive(Debug, Clone, Subcommand)]
pub enum ImageCommand {
    /// Generate images, or complete given ones, and draw a contact sheet
    Generate(Box<GenerateArgs>),
    /// Show the likelihood of images under the model: a score, not a verdict
    /// that an image is an anomaly
    ///
    /// Simple images are more likely than complex ones, whatever the model was
    /// trained on. Use --complexity to print a measure of each image's
    /// complexity for comparison.
    Score(Box<ScoreArgs>),
    /// Show the most likely classes of images
    Classify(Box<ClassifyArgs>),
    /// Show the color tokens of images as the model sees them: each line has
    /// the file, a tab and the token ids
    Tokenize(Box<TokenizeArgs>),
    /// Embed images and show each image's nearest neighbors, as a table and as
    /// a picture
    Neighbors(Box<NeighborsArgs>),
}

/// Outcome of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandOutcome {
    /// Every image has been answered.
    Done,
    /// Some images have no answer, or the worker failed; standard error names
    /// the images and the reasons.
    Failed,
    /// The command was told to end, or nobody reads its output (broken pipe).
    Interrupted,
}

/// Flags that choose the worker to ask.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Worker")]
pub struct WorkerConfig {
    /// Address of the worker
    #[arg(
        long,
        env = "IMAGEGPT_ENDPOINT",
        default_value = "http://127.0.0.1:50051",
        value_name = "URL",
        conflicts_with_all = ["model", "serve"]
    )]
    pub endpoint: String,

    #[command(flatten)]
    pub own: OwnWorkerFlags,

    #[command(flatten)]
    pub connect: ConnectConfig,
}

/// Flags of commands that ask about each image separately.
#[derive(Debug, Clone, Args)]
pub struct EachConfig {
    #[command(flatten)]
    pub input: InputConfig,

    #[command(flatten)]
    pub preprocess: PreprocessConfig,

    /// Print one JSON object per image instead of a table
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub worker: WorkerConfig,
}

impl WorkerConfig {
    /// Flags of a worker in this process, or `None` without `--model`.
    fn own(&self, defaults: &[&str]) -> anyhow::Result<Option<ServeConfig>> {
        self.own.config(&[&QUIET, defaults].concat())
    }
}

impl ImageCommand {
    fn worker(&self) -> &WorkerConfig {
        match self {
            Self::Generate(args) => &args.worker,
            Self::Score(args) => &args.each.worker,
            Self::Classify(args) => &args.each.worker,
            Self::Tokenize(args) => &args.each.worker,
            Self::Neighbors(args) => &args.each.worker,
        }
    }

    /// Flags of a worker in this process, or `None` without `--model`. Parts of
    /// the worker that the command does not need are switched off.
    fn own_worker(&self) -> anyhow::Result<Option<ServeConfig>> {
        let no_slots = ["--generate-slots", "0"];
        let mut own = self.worker().own(match self {
            Self::Generate(_) | Self::Tokenize(_) => &[],
            Self::Score(_) | Self::Classify(_) | Self::Neighbors(_) => &no_slots,
        })?;
        let head = match self {
            Self::Classify(args) => args.head.as_ref(),
            Self::Neighbors(args) => args.head.as_ref(),
            _ => None,
        };
        if let Some(head) = head {
            head.add_to(own.as_mut())?;
        }
        if let Some(own) = &mut own {
            own.model.needs = Some(self.needs());
        }
        Ok(own)
    }

    /// Computations that the command needs of a model.
    fn needs(&self) -> Vec<ModelNeed> {
        let task = match self {
            Self::Generate(_) => CallTask::Generate,
            Self::Score(_) => CallTask::Score,
            // The features of a linear head are needed because the head is
            // loaded.
            Self::Classify(args) if args.head.is_some() => return Vec::new(),
            Self::Classify(_) => CallTask::Classify,
            Self::Tokenize(_) => return Vec::new(),
            Self::Neighbors(_) => CallTask::Embed,
        };
        vec![ModelNeed::Call(task)]
    }

    async fn run(&self, session: &Session, out: &mut impl Write) -> anyhow::Result<CommandOutcome> {
        match self {
            Self::Generate(args) => generate::run(args, session, out).await,
            Self::Score(args) => score::run(args, session, out).await,
            Self::Classify(args) => classify::run(args, session, out).await,
            Self::Tokenize(args) => tokenize::run(args, session, out).await,
            Self::Neighbors(args) => neighbors::run(args, session, out).await,
        }
    }

    fn validate(&self) -> anyhow::Result<()> {
        match self {
            Self::Generate(args) => args.validate(),
            Self::Score(args) => args.each.input.validate(),
            Self::Classify(args) => args.each.input.validate(),
            Self::Tokenize(args) => args.each.input.validate(),
            Self::Neighbors(args) => args.validate(),
        }
    }
}

/// Runs a command and writes its table or JSON to `out`, until the command is
/// done or `stop` resolves.
///
/// # Errors
///
/// When the flags, the files or the worker cannot be used.
pub async fn run(
    command: &ImageCommand,
    stop: impl Future<Output = ()>,
    out: &mut impl Write,
) -> anyhow::Result<CommandOutcome> {
    let mut stop = pin!(stop);
    command.validate()?;
    let own = command.own_worker()?;
    if let Some(config) = &own {
        telemetry::init(&config.log)?;
    }
    let own = match (command, own) {
        (_, None) => None,
        (ImageCommand::Tokenize(args), Some(config)) => {
            let outcome = tokio::select! {
                outcome = tokenize::run_here(args, config, out) => outcome,
                () = stop => Ok(CommandOutcome::Interrupted),
            };
            return told(outcome);
        }
        (_, Some(config)) => match OwnWorker::start(&config, &mut stop).await? {
            Some(worker) => Some(worker),
            None => return Ok(CommandOutcome::Interrupted),
        },
    };
    let asked = async {
        let session = Session::open(command.worker(), own.as_ref()).await?;
        command.run(&session, out).await
    };
    let outcome = tokio::select! {
        outcome = asked => outcome,
        () = stop => Ok(CommandOutcome::Interrupted),
    };
    if let Some(worker) = own {
        worker.end().await;
    }
    told(outcome)
}

/// Returns the outcome of a command. Errors that the flags did not cause are
/// reported here and become [`CommandOutcome::Failed`].
fn told(outcome: anyhow::Result<CommandOutcome>) -> anyhow::Result<CommandOutcome> {
    outcome.or_else(|error| match error.downcast_ref::<std::io::Error>() {
        Some(error) if error.kind() == ErrorKind::BrokenPipe => Ok(CommandOutcome::Interrupted),
        // The flags are wrong if they ask for something that the worker does
        // not have.
        _ if error
            .downcast_ref()
            .is_some_and(|error: &CallError| !error.is_of_request()) =>
        {
            complain(&format!("{error:#}"));
            Ok(CommandOutcome::Failed)
        }
        _ => Err(error),
    })
}

/// Connection to a worker, with the model and the limits of the worker.
struct Session {
    client: Client,
    model: pb::GetModelResponse,
    limits: CallLimits,
    tokens: TokenFacts,
}

/// Limits and concurrency of calls.
#[derive(Debug, Clone, Copy)]
struct Calls {
    limits: CallLimits,
    n_at_once: usize,
}

impl Calls {
    /// Asks about each image with `call`, and passes the answers to `take` in
    /// the order of the inputs. An image without an answer is reported on
    /// standard error.
    async fn each<T, F>(
        self,
        inputs: Inputs,
        call: impl Fn(Vec<Bytes>) -> F,
        mut take: impl FnMut(&str, T) -> anyhow::Result<()>,
    ) -> anyhow::Result<CommandOutcome>
    where
        F: Future<Output = anyhow::Result<Vec<Result<T, String>>>>,
    {
        let batches = ReceiverStream::new(inputs.batches(self.limits)?);
        let calls = batches.map(|batch: CallBatch| {
            let images = batch.images();
            let call = (!images.is_empty()).then(|| call(images));
            async move {
                let outcomes = match call {
                    Some(call) => call.await?,
                    None => Vec::new(),
                };
                anyhow::Ok(batch.answered(outcomes))
            }
        });
        let mut answers = pin!(calls.buffered(self.n_at_once));
        let mut outcome = CommandOutcome::Done;
        while let Some(answers) = answers.next().await {
            for (name, answer) in answers? {
                match answer {
                    Ok(answer) => take(&name, answer)?,
                    Err(reason) => {
                        complain(&format!("{name}: {reason}"));
                        outcome = CommandOutcome::Failed;
                    }
                }
            }
        }
        Ok(outcome)
    }
}

impl Session {
    async fn open(config: &WorkerConfig, own: Option<&OwnWorker>) -> anyhow::Result<Self> {
        let mut client = match own {
            // A client in the same process needs neither TLS nor a token.
            Some(worker) => Client::connect(&worker.endpoint(), &ConnectConfig::default()).await?,
            None => Client::connect(&config.endpoint, &config.connect).await?,
        };
        let model = client.model().await?;
        let limits = CallLimits::new(&model.limits.unwrap_or_default());
        Ok(Self {
            client,
            tokens: TokenFacts::from(&model),
            model,
            limits,
        })
    }

    /// Prints the model and the provider of the worker that answers.
    fn introduce(&self, out: &mut impl Write) -> std::io::Result<()> {
        self.introduce_with("", out)
    }

    /// Prints the model and the provider, with a command's addition after the
    /// digest.
    fn introduce_with(&self, more: &str, out: &mut impl Write) -> std::io::Result<()> {
        let model = &self.model;
        writeln!(
            out,
            "model {} ({}){more}, on {}",
            model.name, model.digest, model.execution_provider
        )?;
        if !model.notice.is_empty() {
            writeln!(out, "notice: {}", model.notice)?;
        }
        Ok(())
    }

    /// Prints the worker's model and the names of the columns, unless the
    /// output is JSON.
    fn head(
        &self,
        config: &EachConfig,
        columns: &str,
        out: &mut impl Write,
    ) -> std::io::Result<()> {
        if config.json {
            return Ok(());
        }
        self.introduce(out)?;
        writeln!(out, "{columns}")
    }

    /// Asks the worker about each image with `call`; see [`Calls::each`].
    async fn each<T, F>(
        &self,
        inputs: Inputs,
        call: impl Fn(Client, Vec<Bytes>) -> F,
        take: impl FnMut(&str, T) -> anyhow::Result<()>,
    ) -> anyhow::Result<CommandOutcome>
    where
        F: Future<Output = anyhow::Result<Vec<Result<T, String>>>>,
    {
        let calls = Calls {
            limits: self.limits,
            n_at_once: CALLS,
        };
        let call = |images| call(self.client.clone(), images);
        calls.each(inputs, call, take).await
    }

    /// Runs [`Self::each`] for the inputs and the preprocessing of the flags.
    async fn each_input<T, F>(
        &self,
        config: &EachConfig,
        call: impl Fn(Client, Vec<Bytes>, pb::Preprocess) -> F,
        take: impl FnMut(&str, T) -> anyhow::Result<()>,
    ) -> anyhow::Result<CommandOutcome>
    where
        F: Future<Output = anyhow::Result<Vec<Result<T, String>>>>,
    {
        let preprocess = config.preprocess.to_pb();
        let call = |client, images| call(client, images, preprocess);
        self.each(Inputs::new(&config.input)?, call, take).await
    }
}
