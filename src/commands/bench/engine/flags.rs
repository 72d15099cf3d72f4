//! Flags of `imagegpt bench engine`. `--help` prints the doc comments.

use std::time::Duration;

use clap::Args;

use crate::commands::output::value_name;
use crate::commands::serve::{MoreServeFlags, own_config};
use crate::model::Model;
use crate::model::graph::Graph;
use crate::serve::config::bounds::{DAY, bounded_time};
use crate::serve::config::{GpuCopiesFlags, LibraryFlags, ProviderFlags, ServeConfig, device_id};

#[derive(Debug, Clone, Args)]
pub struct EngineArgs {
    /// Model to measure, as for `imagegpt serve`: a compiled directory, or a
    /// source such as random:small, which is compiled first
    #[arg(long, env = "IMAGEGPT_MODEL", value_name = "SOURCE")]
    pub model: String,

    #[command(flatten)]
    pub provider: ProviderFlags,

    /// Number of the GPU to use, counted from 0
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = device_id())]
    pub device_id: i32,

    #[command(flatten)]
    pub copies: GpuCopiesFlags,

    #[command(flatten)]
    pub library: LibraryFlags,

    /// Batch sizes to measure, in ascending order
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N[,N]",
        default_value = "1,2,4,8,16,32,64",
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    pub batch_sizes: Vec<u16>,

    /// Graphs to load and measure, by their names in metrics: features,
    /// features_raw, hidden, logits, score, generate [default: all graphs of
    /// the model]
    #[arg(long, value_delimiter = ',', value_name = "GRAPH[,GRAPH]")]
    pub graphs: Vec<String>,

    /// Number of images that are generated at the same time. Steps are measured
    /// in the sizes that a worker runs: 1, 2, 4 and so on up to this number; on a
    /// GPU this number alone. 0 does not measure generation
    #[arg(
        long,
        default_value_t = 8,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(0..=1024)
    )]
    pub generate_slots: u16,

    /// Numbers of earlier tokens that each image has when a step adds the next
    /// token [default: 1, half of an image, and all but its last token]
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N[,N]",
        value_parser = clap::value_parser!(u16).range(0..=4096)
    )]
    pub generate_pasts: Vec<u16>,

    /// Number of the earlier tokens that each image has for itself; the tokens
    /// before these are shared by all images, as in samples of one primer
    /// [default: all, so that nothing is shared]
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(0..=4096)
    )]
    pub generate_own: Option<u16>,

    /// Before measuring, fill the key/value caches with NaN and report whether
    /// steps notice: a kernel that multiplies what follows a sequence's end by
    /// zero does. The results are in --json
    #[arg(long)]
    pub nan_cache: bool,

    /// Number of rounds; in each round every graph runs at every batch size
    #[arg(
        long,
        default_value_t = 5,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(1..=1000)
    )]
    pub rounds: u16,

    /// Time to spend on each graph at each batch size, over all rounds; every
    /// graph runs at least once per round
    #[arg(long, default_value = "2s", value_name = "TIME", value_parser = bounded_time(Duration::ZERO, DAY))]
    pub seconds: Duration,

    /// The same checkpoint compiled in fp32: reports how much the answers of
    /// --model differ from its answers
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
            "--batch-sizes {sizes:?} must be in ascending order"
        );
        for name in &self.graphs {
            anyhow::ensure!(
                Graph::ALL.iter().any(|graph| graph.label() == name),
                "--graphs: there is no graph {name}; the graphs are {}",
                Graph::ALL.map(Graph::label).join(", ")
            );
        }
        match self.graphs.as_slice() {
            // The graphs are not known before the model is loaded.
            [] => Ok(()),
            graphs => self.check_steps(graphs.iter().map(String::as_str)),
        }
    }

    /// Returns an error if the flags leave nothing to measure.
    fn check_steps<'a>(&self, mut graphs: impl Iterator<Item = &'a str>) -> anyhow::Result<()> {
        let only_steps = graphs.all(|graph| graph == Graph::Generate.label());
        anyhow::ensure!(
            self.generate_slots > 0 || !only_steps,
            "--generate-slots 0 leaves nothing to measure of the graph generate; raise it, or name \
             other graphs (--graphs)"
        );
        Ok(())
    }

    /// Flags of a worker that would run the same graphs.
    pub(super) fn serve_config(&self, model: &str) -> anyhow::Result<ServeConfig> {
        let sizes: Vec<String> = self.batch_sizes.iter().map(u16::to_string).collect();
        let mut flags = vec![
            "--execution-provider".to_owned(),
            value_name(&self.provider.execution_provider),
            "--device-id".to_owned(),
            self.device_id.to_string(),
            "--batch-sizes".to_owned(),
            sizes.join(","),
            "--max-batch-size".to_owned(),
            sizes.last().cloned().unwrap_or_default(),
            "--generate-slots".to_owned(),
            self.generate_slots.to_string(),
            "--gpu-copies".to_owned(),
            value_name(&self.copies.gpu_copies),
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

    /// Removes the graphs that were not asked for.
    pub(super) fn keep_asked(&self, model: &mut Model) -> anyhow::Result<()> {
        let is_asked = |graph: Graph| {
            let asked = &self.graphs;
            asked.is_empty() || asked.iter().any(|name| graph.label() == name)
        };
        model.graphs.retain(|graph, _| is_asked(*graph));
        anyhow::ensure!(
            !model.graphs.is_empty(),
            "--graphs: the model has none of the graphs {}",
            self.graphs.join(", ")
        );
        self.check_steps(model.graphs.keys().map(|graph| graph.label()))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::runtime::GpuCopies;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: EngineArgs,
    }

    fn copies(flags: &[&str]) -> GpuCopies {
        let flags = ["engine", "--model", "m"].iter().chain(flags);
        let args = Cli::try_parse_from(flags).unwrap().args;
        args.serve_config("m").unwrap().model.copies.gpu_copies
    }

    #[test]
    fn the_engine_copies_as_the_flag_says_unless_serve_says_otherwise() {
        assert_eq!(copies(&[]), GpuCopies::OnnxRuntime);
        assert_eq!(copies(&["--gpu-copies", "driver"]), GpuCopies::Driver);
        let of_serve = ["--serve", "--gpu-copies driver"];
        assert_eq!(copies(&of_serve), GpuCopies::Driver);
        let both = [
            "--gpu-copies",
            "driver",
            "--serve",
            "--gpu-copies onnxruntime",
        ];
        assert_eq!(copies(&both), GpuCopies::OnnxRuntime);
    }
}
