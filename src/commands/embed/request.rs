//! Conversion of flags into the requests that workers get, and into the options
//! that the manifest records.

use std::collections::BTreeMap;

use super::flags::{Dtype, EmbedArgs, EmbedTask, Pooling, TaskConfig};
use crate::client::pool;
use crate::imaging::PreprocessOptions;
use crate::proto::{pb, preprocess_applied};

/// Checks that the workers' model can do the task, and explains what it lacks.
pub(super) fn check_model(model: &pb::GetModelResponse, task: &TaskConfig) -> anyhow::Result<()> {
    let can = |wanted: pb::Task| model.tasks.contains(&wanted.into());
    match (task.task, &task.head) {
        (EmbedTask::Score, _) => anyhow::ensure!(
            can(pb::Task::Score),
            "--task score: the workers' model {} cannot compute likelihoods",
            model.name
        ),
        (EmbedTask::Embed, _) => {
            anyhow::ensure!(
                can(pb::Task::Embed) && model.dimension > 0,
                "--task embed: the workers' model {} cannot compute embeddings",
                model.name
            );
            let served = &model.layers_served;
            if let (Some(layer), Some(first), Some(last)) =
                (task.layer, served.first(), served.last())
            {
                let is_run = served.len() as u64 == u64::from(last.saturating_sub(*first)) + 1;
                let known = if is_run {
                    format!("{first} to {last}")
                } else {
                    let known: Vec<String> = served.iter().map(u32::to_string).collect();
                    known.join(", ")
                };
                anyhow::ensure!(
                    served.contains(&layer),
                    "--layer {layer}: the workers' model {} serves layers {known}; give one of \
                     these, or start the workers with --feature-layer {layer}",
                    model.name
                );
            }
        }
        (EmbedTask::Classify, Some(name)) => {
            let heads: Vec<&str> = model.heads.iter().map(|head| head.name.as_str()).collect();
            anyhow::ensure!(
                heads.contains(&name.as_str()),
                "--head {name}: the workers' model {} has no such head; its linear heads: {}",
                model.name,
                if heads.is_empty() {
                    "none".to_owned()
                } else {
                    heads.join(", ")
                }
            );
        }
        (EmbedTask::Classify, None) => {
            let own = can(pb::Task::Classify) && !model.labels.is_empty();
            // If the checkpoint has no head of its own, the only loaded head is
            // meant.
            let only = !can(pb::Task::Classify) && model.heads.len() == 1;
            anyhow::ensure!(
                own || only,
                "--task classify: the workers' model {} has no classes with names; give --head \
                 to use a linear head",
                model.name
            );
        }
    }
    Ok(())
}

fn preprocess(task: &TaskConfig) -> pb::Preprocess {
    preprocess_applied(PreprocessOptions {
        fit: task.fit,
        alpha: task.alpha,
    })
}

/// Returns the layer to ask for, if the pooling allows a choice.
fn layer(task: &TaskConfig, model: &pb::GetModelResponse) -> Option<u32> {
    match task.pooling {
        Pooling::Mean => Some(task.layer.unwrap_or(model.layer_default)),
        Pooling::Last => task.layer,
    }
}

/// Makes the request that workers get. Every default is written out, since
/// workers must apply exactly these options.
pub(super) fn asked(task: &TaskConfig, model: &pb::GetModelResponse) -> pool::PoolWork {
    match task.task {
        EmbedTask::Embed => pool::PoolWork::Embed(pb::EmbedStreamOptions {
            preprocess: Some(preprocess(task)),
            context: pb::Context::from(task.context).into(),
            pooling: match task.pooling {
                Pooling::Mean => pb::Pooling::Mean,
                Pooling::Last => pb::Pooling::Last,
            }
            .into(),
            normalize: task.normalize,
            dtype: match task.dtype {
                Dtype::F32 => pb::DataType::F32,
                Dtype::F16 => pb::DataType::F16,
            }
            .into(),
            layers: layer(task, model).into_iter().collect(),
            norm: pb::Norm::from(task.norm).into(),
            order: pb::Order::AsDone.into(),
            window: 0,
        }),
        EmbedTask::Score => pool::PoolWork::Score(pb::ScoreRequest {
            images: Vec::new(),
            preprocess: Some(preprocess(task)),
            map: false,
            complexity: true,
        }),
        EmbedTask::Classify => pool::PoolWork::Classify(pb::ClassifyRequest {
            images: Vec::new(),
            preprocess: Some(preprocess(task)),
            // The checkpoint's own head takes the image alone, as Hugging
            // Face's classes do; a linear head records its own context.
            context: pb::Context::Unspecified.into(),
            top_k: task.top_k,
            logits: false,
            head: task.head.clone().unwrap_or_default(),
        }),
    }
}

/// Lists all options on which the output's bytes depend, besides the model and
/// the input.
pub(super) fn options(args: &EmbedArgs, model: &pb::GetModelResponse) -> BTreeMap<String, String> {
    let (task, table) = (&args.task, &args.table);
    let mut options = BTreeMap::new();
    let mut set = |name: &str, value: String| options.insert(name.to_owned(), value);
    set("--task", value_name(&task.task));
    set("--fit", value_name(&task.fit));
    set("--alpha", value_name(&task.alpha));
    match task.task {
        EmbedTask::Embed => {
            set("--pooling", value_name(&task.pooling));
            if let Some(layer) = layer(task, model) {
                set("--layer", layer.to_string());
            }
            set("--context", value_name(&task.context));
            set("--norm", value_name(&task.norm));
            set("--normalize", task.normalize.to_string());
            set("--dtype", value_name(&task.dtype));
        }
        EmbedTask::Score => {}
        EmbedTask::Classify => {
            set("--head", task.head.clone().unwrap_or_default());
            set("--top-k", task.top_k.to_string());
        }
    }
    set("--format", value_name(&table.format));
    set("--keep", table.keep.join(","));
    set(
        "--image-column",
        table.image_column.clone().unwrap_or_default(),
    );
    // Jobs that began before the flag existed have no value of it.
    if let Some(name) = &table.url_column {
        set("--url-column", name.clone());
    }
    set("--id-column", table.id_column.clone().unwrap_or_default());
    set("--part-items", table.part_items.to_string());
    options
}

/// Formats a value as it is written on the command line.
fn value_name(value: &impl clap::ValueEnum) -> String {
    let name = value.to_possible_value();
    name.map_or_else(String::new, |name| name.get_name().to_owned())
}
