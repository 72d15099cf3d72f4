//! Jobs of `imagegpt embed` that a probe needs, with the worker that they ask.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::builder::Resettable;
use clap::{CommandFactory as _, FromArgMatches as _, Parser};
use sha2::{Digest as _, Sha256};

use super::flags::{ExamplesConfig, ReadingConfig};
use crate::client::ConnectConfig;
use crate::client::pool::{self, PoolConfig};
use crate::commands::embed::flags::{EmbedArgs, WorkersConfig};
use crate::commands::embed::{self, Differs, JobEnded, Terminal};
use crate::commands::output::value_name as name;
use crate::commands::serve::OwnWorker;
use crate::files::hex;
use crate::imaging::{Alpha, Fit};
use crate::model::ModelNeed;
use crate::proto::pb;

/// Ending of a job before it was done, which ends the command.
#[derive(Debug, thiserror::Error)]
#[error("a job that embeds the images has not finished")]
pub(super) struct Unfinished(pub(super) JobEnded);

/// Workers that the jobs ask: a pool, or one in this process.
pub(super) struct ProbeWorkers<'a> {
    config: &'a WorkersConfig,
    connect: &'a ConnectConfig,
    terminal: &'a Terminal,
    needs: Vec<ModelNeed>,
    own: Option<OwnWorker>,
}

/// Options of a job besides the images.
#[derive(Debug, Clone, Copy)]
pub(super) struct JobOptions<'a> {
    pub(super) examples: &'a ExamplesConfig,
    pub(super) reading: &'a ReadingConfig,
    pub(super) fit: Fit,
    pub(super) alpha: Alpha,
    /// Columns to keep besides the labels.
    pub(super) keep: &'a [&'a str],
}

impl<'a> ProbeWorkers<'a> {
    pub(super) fn new(
        config: &'a WorkersConfig,
        connect: &'a ConnectConfig,
        terminal: &'a Terminal,
        needs: Vec<ModelNeed>,
    ) -> Self {
        Self {
            config,
            connect,
            terminal,
            needs,
            own: None,
        }
    }

    /// Returns the addresses of the workers; starts the one in this process.
    async fn endpoints(&mut self) -> anyhow::Result<Vec<String>> {
        if let Some(own) = &self.own {
            return Ok(vec![own.endpoint()]);
        }
        let Some(mut config) = self.config.own.config(&["--generate-slots", "0"])? else {
            return Ok(self.config.endpoints.clone());
        };
        config.model.needs = Some(self.needs.clone());
        let worker = OwnWorker::start(&config, std::future::pending()).await?;
        let worker = worker.context("the worker ended before it was ready")?;
        let endpoint = worker.endpoint();
        self.own = Some(worker);
        Ok(vec![endpoint])
    }

    /// Asks a worker for its model.
    pub(super) async fn model(&mut self) -> anyhow::Result<pb::GetModelResponse> {
        let pool = PoolConfig {
            endpoints: self.endpoints().await?,
            connect: self.connect.clone(),
            window: self.config.window,
            item_timeout: self.config.item_timeout,
            resolve_interval: self.config.resolve_interval,
        };
        pool.check()?;
        pool::first_model(&pool, self.config.give_up_after).await
    }

    /// Runs a job to its end, or goes on with it; its flags are those of
    /// `options` and `more`. Returns the directory of its output: one of `work`
    /// that is named after `name` and the flags, so that a command with other
    /// inputs or options has another one.
    ///
    /// # Errors
    ///
    /// [`Unfinished`] when the job ended before it was done; else flags or inputs
    /// that cannot be used.
    pub(super) async fn run(
        &mut self,
        options: JobOptions<'_>,
        more: &[&str],
        (work, name): (&Path, &str),
        stop: &mut (impl Future<Output = ()> + Unpin),
    ) -> anyhow::Result<PathBuf> {
        let mut flags = flags(options, more);
        let digest = hex(&Sha256::digest(flags.join("\0")));
        let output = work.join(format!("{name}-{}", &digest[..8]));
        let shown = output.to_str().context("the path of --work is not UTF-8")?;
        flags.push(format!("--output={shown}"));
        // A higher limit goes on with the same job.
        flags.push(format!("--max-errors={}", options.reading.max_errors));
        let mut args = parsed(&flags)?;
        args.workers = self.config.clone();
        args.connect = self.connect.clone();
        if let Some(ended) = embed::check(&args).await? {
            return Err(Unfinished(ended).into());
        }
        let terminal = self.terminal;
        // The job's own report is for a command of its own.
        let mut report = Vec::new();
        let endpoints = self.endpoints();
        let ended = embed::run(&args, endpoints, terminal, stop, &mut report).await;
        let ended = ended.map_err(|error| {
            if !error.is::<Differs>() {
                return error;
            }
            error.context(format!(
                "the images or the model have changed since {shown} was made; remove it, or give \
                 another --work"
            ))
        })?;
        match ended {
            JobEnded::Done => Ok(output),
            ended => Err(Unfinished(ended).into()),
        }
    }

    /// Ends the worker in this process.
    pub(super) async fn end(self) {
        if let Some(own) = self.own {
            own.end().await;
        }
    }
}

/// Flags of a job as `imagegpt embed` has them, but its output.
fn flags(options: JobOptions<'_>, more: &[&str]) -> Vec<String> {
    let JobOptions {
        examples, reading, ..
    } = options;
    let mut flags: Vec<String> = examples.inputs.clone();
    let mut set = |flag: &str, value: String| flags.push(format!("{flag}={value}"));
    set("--fit", name(&options.fit));
    set("--alpha", name(&options.alpha));
    set("--part-items", reading.part_items.to_string());
    // One column may have several meanings.
    let keep: BTreeSet<&str> = (examples.label.as_deref().into_iter())
        .chain(options.keep.iter().copied())
        .collect();
    let keep: Vec<&str> = keep.into_iter().collect();
    if !keep.is_empty() {
        set("--keep", keep.join(","));
    }
    for (flag, value) in [
        ("--kind", reading.kind.as_ref().map(name)),
        ("--image-column", reading.image_column.clone()),
        ("--url-column", reading.url_column.clone()),
        ("--id-column", reading.id_column.clone()),
    ] {
        if let Some(value) = value {
            set(flag, value);
        }
    }
    flags.extend(more.iter().map(|&flag| flag.to_owned()));
    flags
}

/// Parses the flags of a job. Variables of the environment are not read: they are
/// meant for jobs of their own.
fn parsed(flags: &[String]) -> anyhow::Result<EmbedArgs> {
    #[derive(Debug, Parser)]
    struct Job {
        #[command(flatten)]
        args: EmbedArgs,
    }
    let command = Job::command().mut_args(|arg| arg.env(Resettable::Reset));
    let given = std::iter::once("embed").chain(flags.iter().map(String::as_str));
    let matches = command.try_get_matches_from(given).map_err(|error| {
        let text = error.to_string();
        let text = text.split("\n\n").next().unwrap_or_default().to_owned();
        anyhow::anyhow!("{}", text.trim_start_matches("error: "))
    })?;
    Ok(Job::from_arg_matches(&matches)?.args)
}

/// Returns a directory for the jobs of a command, which is made.
pub(super) fn work_folder(
    given: Option<&Path>,
    file: &Path,
    extension: &str,
) -> anyhow::Result<PathBuf> {
    let folder = given.map_or_else(|| file.with_extension(extension), Path::to_owned);
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("--work {} cannot be created", folder.display()))?;
    Ok(folder)
}
