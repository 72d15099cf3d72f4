//! Conversion of flags into the requests that workers get, and into the options
//! that the manifest records.

use std::collections::BTreeMap;

use super::flags::{Dtype, EmbedArgs, EmbedTask, LayerChoice, Pooling, TaskConfig};
use super::pipeline::PARTS_OPEN;
use super::table::VectorShape;
use crate::client::pool;
use crate::commands::output::value_name;
use crate::imaging::{Alpha, Fit, PreprocessOptions};
use crate::model::graph::ranges;
use crate::proto::{self, pb, preprocess_applied};

/// Memory that the vectors of unfinished parts may take: what a small machine
/// has to spare, and 40 times what the defaults take with the largest
/// published model and one layer.
const OPEN_VECTORS_BYTES_MAX: u64 = 4 << 30;

/// Checks that the workers' model can do the task, and explains what it lacks.
pub(super) fn check_model(model: &pb::GetModelResponse, task: &TaskConfig) -> anyhow::Result<()> {
    let can = |wanted: pb::Task| model.tasks.contains(&wanted.into());
    match (task.task, &task.head) {
        (EmbedTask::Tokenize, _) => {}
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
            check_layers(model, task)?;
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
            check_preprocess(model, task)?;
        }
        (EmbedTask::Classify, None) => {
            let own = can(pb::Task::Classify) && !model.labels.is_empty();
            // If the checkpoint has no head of its own, the only loaded head is
            // meant.
            anyhow::ensure!(
                own || head(task, model).is_some(),
                "--task classify: the workers' model {} has no classes with names; give --head \
                 to use a linear head",
                model.name
            );
            check_preprocess(model, task)?;
        }
    }
    Ok(())
}

/// Returns the linear head that classifies; `None` for other tasks, and if the
/// checkpoint's own head classifies.
fn head<'a>(task: &TaskConfig, model: &'a pb::GetModelResponse) -> Option<&'a pb::Head> {
    if task.task != EmbedTask::Classify {
        return None;
    }
    let name = task.head.as_ref().unwrap_or(&model.head_default);
    model.heads.iter().find(|head| head.name == *name)
}

/// Returns the options with which a head was trained, as far as it says so.
fn trained(head: &pb::Head) -> (Option<Fit>, Option<Alpha>) {
    // Workers refuse every value but that of the head, also one that this
    // version does not know.
    (proto::fit(head.fit()), proto::alpha(head.alpha()))
}

/// Checks that flags and linear head agree on the options of preprocessing.
fn check_preprocess(model: &pb::GetModelResponse, task: &TaskConfig) -> anyhow::Result<()> {
    let Some(head) = head(task, model) else {
        return Ok(());
    };
    let (fit, alpha) = trained(head);
    let check = |flag: &str, given: Option<String>, trained: Option<String>| {
        if let (Some(given), Some(trained)) = (given, trained)
            && given != trained
        {
            anyhow::bail!(
                "{flag} {given}: the head {} was trained with {trained}; leave {flag} out",
                head.name
            );
        }
        Ok(())
    };
    let names = |fit: Option<Fit>| fit.as_ref().map(value_name);
    check("--fit", names(task.fit), names(fit))?;
    let names = |alpha: Option<Alpha>| alpha.as_ref().map(value_name);
    check("--alpha", names(task.alpha), names(alpha))
}

/// Checks that the workers' model serves the layers that are asked for, several
/// of them in one run.
fn check_layers(model: &pb::GetModelResponse, task: &TaskConfig) -> anyhow::Result<()> {
    let served = &model.layers_served;
    let refuse = |flag: &str, layer: u32, does: &str, known: &[u32]| {
        anyhow::bail!(
            "{flag} {layer}: the workers' model {} {does} {}; give one of these, or start the \
             workers with --feature-layer {layer}",
            model.name,
            ranges(known)
        )
    };
    let is_served = |layer: u32| served.is_empty() || served.contains(&layer);
    if let Some(layer) = task.layer.filter(|layer| !is_served(*layer)) {
        return refuse("--layer", layer, "serves layers", served);
    }
    let together = together(model);
    match &task.layers {
        None => {}
        Some(LayerChoice::All) => anyhow::ensure!(
            !together.is_empty(),
            "--layers all: the workers' model {} does not say which layers it serves; leave the \
             flag out",
            model.name
        ),
        Some(LayerChoice::Named(layers)) => {
            let missing = layers.iter().copied().find(|layer| !is_served(*layer));
            if let Some(layer) = missing {
                return refuse("--layers", layer, "serves layers", served);
            }
            // Layers after the feature layer come from another run.
            let apart = layers.iter().find(|layer| !together.contains(layer));
            if let Some(layer) = apart.filter(|_| layers.len() > 1) {
                return refuse("--layers", *layer, "computes in one run layers", &together);
            }
        }
    }
    Ok(())
}

/// Lists the layers that the model computes in one run: those up to the default
/// layer, after which there is at most the last layer, from another run.
fn together(model: &pb::GetModelResponse) -> Vec<u32> {
    let served = model.layers_served.iter().copied();
    served
        .filter(|&layer| layer <= model.layer_default)
        .collect()
}

/// Returns the options of preprocessing: those of the flags, or else those with
/// which the linear head was trained, or else the defaults.
fn preprocess(task: &TaskConfig, model: &pb::GetModelResponse) -> PreprocessOptions {
    let (fit, alpha) = head(task, model).map_or((None, None), trained);
    PreprocessOptions {
        fit: task.fit.or(fit).unwrap_or_default(),
        alpha: task.alpha.or(alpha).unwrap_or_default(),
    }
}

/// Describes the vectors that are stored for each image.
pub(super) fn vector_shape(task: &TaskConfig, model: &pb::GetModelResponse) -> VectorShape {
    VectorShape {
        layers: stored_layers(task, model),
        dimension: model.dimension as usize,
        dtype: task.dtype,
    }
}

/// Checks that the vectors of unfinished parts fit into
/// [`OPEN_VECTORS_BYTES_MAX`].
pub(super) fn check_part_items(
    args: &EmbedArgs,
    model: &pb::GetModelResponse,
) -> anyhow::Result<()> {
    if args.task.task != EmbedTask::Embed {
        return Ok(());
    }
    let image = vector_shape(&args.task, model).bytes_of_image() as u64;
    let max = OPEN_VECTORS_BYTES_MAX / (PARTS_OPEN as u64 * image.max(1));
    anyhow::ensure!(
        u64::from(args.table.part_items) <= max,
        "--part-items {}: the vectors of one image take {image} bytes, and those of {PARTS_OPEN} \
         unfinished parts would take more than {}, the limit; give at most --part-items {max}",
        args.table.part_items,
        bytesize::ByteSize(OPEN_VECTORS_BYTES_MAX)
    );
    Ok(())
}

/// Returns the layers to ask for; none if the pooling allows no choice.
fn layers(task: &TaskConfig, model: &pb::GetModelResponse) -> Vec<u32> {
    match (task.pooling, stored_layers(task, model)) {
        (_, Some(layers)) => layers,
        (Pooling::Mean, None) => vec![task.layer.unwrap_or(model.layer_default)],
        (Pooling::Last, None) => task.layer.into_iter().collect(),
    }
}

/// Returns the layers of `--layers`, each of which has a column of its own.
fn stored_layers(task: &TaskConfig, model: &pb::GetModelResponse) -> Option<Vec<u32>> {
    task.layers.as_ref().map(|layers| match layers {
        LayerChoice::All => together(model),
        LayerChoice::Named(layers) => layers.clone(),
    })
}

/// Makes the request that workers get. Every default is written out, since
/// workers must apply exactly these options.
pub(super) fn asked(task: &TaskConfig, model: &pb::GetModelResponse) -> pool::PoolWork {
    let preprocess = preprocess_applied(preprocess(task, model));
    match task.task {
        EmbedTask::Embed => pool::PoolWork::Embed(pb::EmbedStreamOptions {
            preprocess: Some(preprocess),
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
            layers: layers(task, model),
            norm: pb::Norm::from(task.norm).into(),
            order: pb::Order::AsDone.into(),
            window: 0,
        }),
        EmbedTask::Tokenize => pool::PoolWork::Tokenize(pb::TokenizeRequest {
            images: Vec::new(),
            preprocess: Some(preprocess),
        }),
        EmbedTask::Score => pool::PoolWork::Score(pb::ScoreRequest {
            images: Vec::new(),
            preprocess: Some(preprocess),
            map: false,
            complexity: true,
        }),
        EmbedTask::Classify => pool::PoolWork::Classify(pb::ClassifyRequest {
            images: Vec::new(),
            preprocess: Some(preprocess),
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
    let PreprocessOptions { fit, alpha } = preprocess(task, model);
    set("--fit", value_name(&fit));
    set("--alpha", value_name(&alpha));
    match task.task {
        EmbedTask::Embed => {
            set("--pooling", value_name(&task.pooling));
            let layers: Vec<String> = layers(task, model).iter().map(u32::to_string).collect();
            let flag = if task.layers.is_some() {
                "--layers"
            } else {
                "--layer"
            };
            if !layers.is_empty() {
                set(flag, layers.join(","));
            }
            set("--context", value_name(&task.context));
            set("--norm", value_name(&task.norm));
            set("--normalize", task.normalize.to_string());
            set("--dtype", value_name(&task.dtype));
        }
        EmbedTask::Score | EmbedTask::Tokenize => {}
        EmbedTask::Classify => {
            set("--head", task.head.clone().unwrap_or_default());
            // Another head of the same name gives other scores.
            if let Some(head) = head(task, model).filter(|head| !head.digest.is_empty()) {
                set("the head's digest", head.digest.clone());
            }
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        embed: EmbedArgs,
    }

    fn args(flags: &[&str]) -> EmbedArgs {
        let given = ["embed", "in", "--output", "o"].iter().chain(flags);
        Cli::try_parse_from(given).expect("flags").embed
    }

    /// Describes a model of 24 layers whose features end at layer 16.
    fn model() -> pb::GetModelResponse {
        pb::GetModelResponse {
            name: "small".to_owned(),
            tasks: vec![pb::Task::Embed.into()],
            dimension: 512,
            layers_served: (0..=16).chain([24]).collect(),
            layer_default: 16,
            ..Default::default()
        }
    }

    fn check(flags: &[&str], expected: Result<(&str, &str), &str>) {
        let (args, model) = (args(flags), model());
        let got = check_model(&model, &args.task)
            .and_then(|()| check_part_items(&args, &model))
            .map(|()| options(&args, &model));
        match (got, expected) {
            (Ok(got), Ok((flag, layers))) => {
                assert_eq!(got.get(flag).map(String::as_str), Some(layers), "{flags:?}");
                let others = ["--layer", "--layers"].into_iter();
                assert_eq!(others.filter(|flag| got.contains_key(*flag)).count(), 1);
            }
            (Err(error), Err(words)) => {
                assert!(error.to_string().contains(words), "{flags:?}: {error}");
            }
            (got, _) => panic!("{flags:?}: {got:?}"),
        }
    }

    #[test]
    fn layers_are_those_of_one_run() {
        check(&[], Ok(("--layer", "16")));
        check(&["--layer", "24"], Ok(("--layer", "24")));
        check(
            &["--layer", "17"],
            Err("--layer 17: the workers' model small serves layers 0 to 16 and 24"),
        );
        let all: Vec<String> = (0..=16).map(|layer| layer.to_string()).collect();
        check(&["--layers", "all"], Ok(("--layers", &all.join(","))));
        check(&["--layers", "16, 8,8"], Ok(("--layers", "8,16")));
        check(&["--layers", "24"], Ok(("--layers", "24")));
        check(
            &["--layers", "8,24"],
            Err("--layers 24: the workers' model small computes in one run layers 0 to 16"),
        );
        check(
            &["--layers", "8,20"],
            Err("start the workers with --feature-layer 20"),
        );
    }

    #[test]
    fn a_head_decides_how_images_become_tokens() {
        let mut model = pb::GetModelResponse {
            tasks: vec![pb::Task::Classify.into()],
            heads: ["old", "white"]
                .map(|name| pb::Head {
                    name: name.to_owned(),
                    ..Default::default()
                })
                .into(),
            ..model()
        };
        model.heads[1].alpha = pb::Alpha::White.into();
        let check = |model: &pb::GetModelResponse, flags: &[&str], expected: Result<_, &str>| {
            let args = args(&[&["--task", "classify"], flags].concat());
            let got = check_model(model, &args.task).map(|()| {
                let options = options(&args, model);
                let pool::PoolWork::Classify(asked) = asked(&args.task, model) else {
                    panic!("another task");
                };
                let asked = asked.preprocess.expect("options");
                let [fit, alpha] = ["--fit", "--alpha"].map(|flag| options[flag].clone());
                let asked_alpha = asked.alpha().as_str_name().to_lowercase();
                assert_eq!(asked_alpha, format!("alpha_{alpha}"), "as recorded");
                assert_eq!(asked.fit() == pb::Fit::CenterCrop, fit == "center-crop");
                (fit, alpha)
            });
            match (got, expected) {
                (Ok(got), Ok((fit, alpha))) => {
                    assert_eq!((got.0.as_str(), got.1.as_str()), (fit, alpha), "{flags:?}");
                }
                (Err(error), Err(words)) => {
                    assert!(error.to_string().contains(words), "{flags:?}: {error}");
                }
                (got, _) => panic!("{flags:?}: {got:?}"),
            }
        };
        // As a job of an older version recorded them.
        check(&model, &["--head", "old"], Ok(("squash", "drop")));
        let flags = ["--head", "old", "--alpha", "white"];
        check(&model, &flags, Ok(("squash", "white")));
        check(&model, &["--head", "white"], Ok(("squash", "white")));
        let flags = [
            "--head",
            "white",
            "--alpha",
            "white",
            "--fit",
            "center-crop",
        ];
        check(&model, &flags, Ok(("center-crop", "white")));
        let words = "--alpha drop: the head white was trained with white; leave --alpha out";
        check(&model, &["--head", "white", "--alpha", "drop"], Err(words));
        // Without a name the head is the one that the worker says.
        check(&model, &[], Err("has no classes with names; give --head"));
        model.head_default = "white".to_owned();
        check(&model, &[], Ok(("squash", "white")));
        model.labels = vec!["a".to_owned()];
        model.head_default.clear();
        check(&model, &[], Ok(("squash", "drop")));
    }

    #[test]
    fn unfinished_parts_fit_into_memory() {
        check(
            &["--layers", "all", "--part-items", "30840"],
            Ok(("--format", "parquet")),
        );
        check(
            &["--layers", "all", "--part-items", "30841"],
            Err(
                "take 34816 bytes, and those of 4 unfinished parts would take more than 4.0 GiB, \
                 the limit; give at most --part-items 30840",
            ),
        );
    }
}
