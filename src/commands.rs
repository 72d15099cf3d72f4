//! Commands that ask a worker about images: `imagegpt generate`, `score`,
//! `classify`, `tokenize` and `neighbors`.
//!
//! What they have in common is here: which worker, how images reach it in calls
//! that fit, and what becomes of those that fail. A command says what to ask and
//! how to show the answer.

pub mod bench;
mod classify;
pub mod cli;
pub mod compile;
mod contact_sheet;
pub mod doctor;
pub mod embed;
mod generate;
mod input;
mod neighbors;
mod output;
pub mod print;
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
use crate::proto::pb;
use crate::serve::config::ServeConfig;
use crate::telemetry;

/// Calls in flight: while one is answered and another decoded, the next is on
/// its way.
const CALLS: usize = 4;
/// A worker of one's own says only what keeps it from serving; whoever wants more
/// says so with `--serve "--log info"`.
const QUIET: [&str; 2] = ["--log", "error"];

/// Commands that ask a worker about images.
#[derive(Debug, Clone, Subcommand)]
pub enum ImageCommand {
    /// Make images, or the rest of given ones, and draw a contact sheet
    Generate(Box<GenerateArgs>),
    /// Show how likely the model finds images: a score, not a verdict that one is
    /// an anomaly
    ///
    /// Simple images are likelier than rich ones, whatever the model was trained
    /// on. --complexity prints how rich an image is, to compare with.
    Score(Box<ScoreArgs>),
    /// Show the likeliest classes of images
    Classify(Box<ClassifyArgs>),
    /// Show the color tokens that the model sees of images: a line is the file, a
    /// tab and the token ids
    Tokenize(Box<TokenizeArgs>),
    /// Embed images and show which of them the model places together, as a table
    /// and as a picture
    Neighbors(Box<NeighborsArgs>),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandOutcome {
    /// Every image has its answer.
    Done,
    /// Some have none, or the worker failed; standard error says which and why.
    Failed,
    /// It was told to end, or nobody reads what it prints.
    Interrupted,
}

/// Which worker is asked.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Worker")]
pub struct WorkerConfig {
    /// Where the worker listens
    #[arg(
        long,
        env = "IMAGEGPT_ENDPOINT",
        default_value = "http://127.0.0.1:50051",
        value_name = "URL",
        conflicts_with = "model"
    )]
    pub endpoint: String,

    #[command(flatten)]
    pub own: OwnWorkerFlags,

    #[command(flatten)]
    pub connect: ConnectConfig,
}

/// What commands that ask about each image by itself have in common.
#[derive(Debug, Clone, Args)]
pub struct EachConfig {
    #[command(flatten)]
    pub input: InputConfig,

    #[command(flatten)]
    pub preprocess: PreprocessConfig,

    /// Print one JSON object an image instead of a table
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub worker: WorkerConfig,
}

impl WorkerConfig {
    /// The flags of a worker of one's own, where one is asked for.
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

    /// The flags of a worker of one's own, with nothing in it that the command
    /// does not need.
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
        Ok(own)
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

/// Runs a command, with its table or JSON going to `out`, until it is done or
/// `stop` comes.
///
/// # Errors
///
/// Flags, files or a worker that cannot be used.
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

/// How a command ended, of which the errors that are no fault of the flags are told.
fn told(outcome: anyhow::Result<CommandOutcome>) -> anyhow::Result<CommandOutcome> {
    outcome.or_else(|error| match error.downcast_ref::<std::io::Error>() {
        Some(error) if error.kind() == ErrorKind::BrokenPipe => Ok(CommandOutcome::Interrupted),
        // What the flags ask for and the worker does not have is the flags' fault.
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

/// A worker that answers, and what it serves.
struct Session {
    client: Client,
    model: pb::GetModelResponse,
    limits: CallLimits,
    tokens: TokenFacts,
}

/// How images are asked about.
#[derive(Debug, Clone, Copy)]
struct Calls {
    limits: CallLimits,
    n_at_once: usize,
}

impl Calls {
    /// Asks about each image by `call`, and gives the answers to `take` in the
    /// order of the inputs. What has no answer is a line on standard error.
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
            // It is let in by being in the same process.
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

    /// Says to a person who answers.
    fn introduce(&self, out: &mut impl Write) -> std::io::Result<()> {
        self.introduce_with("", out)
    }

    /// The same with what a command tells besides, after the digest.
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

    /// Says who answers and what the columns are, unless it is JSON that is
    /// printed.
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

    /// Asks the worker about each image by `call`; see [`Calls::each`].
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

    /// [`Self::each`] for the inputs and the preprocessing that the flags say.
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
