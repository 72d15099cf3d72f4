//! Flags of `imagegpt bench engine`. `--help` prints the comments.

use std::time::Duration;

use clap::Args;

use crate::commands::serve::{MoreServeFlags, own_config};
use crate::model::Model;
use crate::model::graph::Graph;
use crate::serve::config::bounds::{DAY, bounded_time};
use crate::serve::config::{LibraryFlags, ProviderFlags, ServeConfig, device_id};

#[derive(Debug, Clone, Args)]
pub struct EngineArgs {
    /// What is measured, as for `imagegpt serve`: a compiled directory, or
    /// random:small and the like, which are compiled first
    #[arg(long, env = "IMAGEGPT_MODEL", value_name = "SOURCE")]
    pub model: String,

    #[command(flatten)]
    pub provider: ProviderFlags,

    /// Which GPU, counted from 0
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = device_id())]
    pub device_id: i32,

    #[command(flatten)]
    pub library: LibraryFlags,

    /// Batch sizes that are run, ascending
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N[,N]",
        default_value = "1,2,4,8,16,32,64",
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    pub batch_sizes: Vec<u16>,

    /// Graphs that are loaded and measured, as metrics call them: features,
    /// features_raw, hidden, logits, score, generate [default: all that the
    /// model has]
    #[arg(long, value_delimiter = ',', value_name = "GRAPH[,GRAPH]")]
    pub graphs: Vec<String>,

    /// Images that are generated at one time, in the sizes that steps of a worker
    /// have: 2, 4 and so on up to this many, on a GPU this many alone; 0 does not
    /// measure generation
    #[arg(
        long,
        default_value_t = 8,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(0..=1024)
    )]
    pub generate_slots: u16,

    /// Tokens before the one that a step adds to each image [default: 1, half of
    /// an image, all but its last]
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N[,N]",
        value_parser = clap::value_parser!(u16).range(0..=4096)
    )]
    pub generate_pasts: Vec<u16>,

    /// Tokens that each image has for itself before that one, where what comes
    /// before them is the same in all, as in samples of one primer [default: all]
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(0..=4096)
    )]
    pub generate_own: Option<u16>,

    /// How often everything takes its turn
    #[arg(
        long,
        default_value_t = 5,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(1..=1000)
    )]
    pub rounds: u16,

    /// Time of each graph at each size, over all rounds; one run a round at
    /// least
    #[arg(long, default_value = "2s", value_name = "TIME", value_parser = bounded_time(Duration::ZERO, DAY))]
    pub seconds: Duration,

    /// The same checkpoint compiled in fp32: how far off its answers those of
    /// --model are
    #[arg(long, value_name = "DIR")]
    pub reference: Option<String>,

    #[command(flatten)]
    pub more: MoreServeFlags,
}

impl EngineArgs {
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        let sizes = &self.batch_sizes;
        anyhow::ensure!(
            sizes.windows(2).all(|pair| pair[0] < pair[1]),
            "--batch-sizes {sizes:?} do not ascend"
        );
        for name in &self.graphs {
            anyhow::ensure!(
                Graph::ALL.iter().any(|graph| graph.label() == name),
                "--graphs: there is no graph {name}; {} are known",
                Graph::ALL.map(Graph::label).join(", ")
            );
        }
        match self.graphs.as_slice() {
            // What there is shows once the model is loaded.
            [] => Ok(()),
            graphs => self.check_steps(graphs.iter().map(String::as_str)),
        }
    }

    /// Refuses what would measure nothing.
    fn check_steps<'a>(&self, mut graphs: impl Iterator<Item = &'a str>) -> anyhow::Result<()> {
        let only_steps = graphs.all(|graph| graph == Graph::Generate.label());
        anyhow::ensure!(
            self.generate_slots > 0 || !only_steps,
            "--generate-slots 0 leaves nothing to measure of the graph generate; raise it, or ask \
             for other --graphs"
        );
        Ok(())
    }

    /// The flags of a worker that would run the same.
    pub(super) fn serve_config(&self, model: &str) -> anyhow::Result<ServeConfig> {
        let sizes: Vec<String> = self.batch_sizes.iter().map(u16::to_string).collect();
        let provider = clap::ValueEnum::to_possible_value(&self.provider.execution_provider);
        let mut flags = vec![
            "--execution-provider".to_owned(),
            provider.map_or_else(String::new, |value| value.get_name().to_owned()),
            "--device-id".to_owned(),
            self.device_id.to_string(),
            "--batch-sizes".to_owned(),
            sizes.join(","),
            "--max-batch-size".to_owned(),
            sizes.last().cloned().unwrap_or_default(),
            "--generate-slots".to_owned(),
            self.generate_slots.to_string(),
        ];
        if let Some(library) = &self.library.onnxruntime {
            flags.extend([
                "--onnxruntime".to_owned(),
                library.to_string_lossy().into_owned(),
            ]);
        }
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        own_config(model, &flags, self.more.serve.as_deref())
    }

    /// Leaves only the graphs that are asked for.
    pub(super) fn keep_asked(&self, model: &mut Model) -> anyhow::Result<()> {
        let is_asked = |graph: Graph| {
            let asked = &self.graphs;
            asked.is_empty() || asked.iter().any(|name| graph.label() == name)
        };
        model.graphs.retain(|graph, _| is_asked(*graph));
        anyhow::ensure!(
            !model.graphs.is_empty(),
            "the model has none of the graphs {}",
            self.graphs.join(", ")
        );
        self.check_steps(model.graphs.keys().map(|graph| graph.label()))
    }
}
