//! Linear heads in calls: which head a call means, and the options that follow
//! from the head.

use std::sync::Arc;

use crate::excerpt::Excerpt;
use crate::imaging::PreprocessOptions;
use crate::model::head::LinearHead;
use crate::model::{CallTask, Model};
use crate::proto::pb;
use crate::serve::job::RequestedWork;
use crate::serve::rpc::convert;
use crate::serve::rpc::error::RequestError;

/// Heads that an error names: a status travels in headers of some KiB, and a
/// directory may have hundreds of heads.
const HEADS_NAMED: usize = 16;

/// Returns the linear head that a call names or implies; `None` is the
/// checkpoint's own head.
pub(super) fn named(
    heads: &[Arc<LinearHead>],
    given: &str,
    model: &Model,
) -> Result<Option<Arc<LinearHead>>, RequestError> {
    if given.is_empty() {
        return match heads {
            _ if model.can(CallTask::Classify) => Ok(None),
            [only] => Ok(Some(Arc::clone(only))),
            [] => Err(RequestError::TaskMissing {
                task: CallTask::Classify,
                file: CallTask::Classify.file(),
            }),
            _ => Err(unknown(heads, given)),
        };
    }
    match heads.iter().find(|head| head.name == given) {
        Some(head) => Ok(Some(Arc::clone(head))),
        None => Err(unknown(heads, given)),
    }
}

fn unknown(heads: &[Arc<LinearHead>], given: &str) -> RequestError {
    let shown = heads.iter().take(HEADS_NAMED);
    let names: Vec<String> = shown
        .map(|head| Excerpt::of(&head.name).to_string())
        .collect();
    let known = match (names.as_slice(), heads.len().saturating_sub(HEADS_NAMED)) {
        ([], _) => "no heads".to_owned(),
        (names, 0) => names.join(", "),
        (names, more) => format!("{} and {more} more", names.join(", ")),
    };
    RequestError::HeadUnknown {
        given: Excerpt::of(given),
        known,
    }
}

/// Returns the work that computes the features for a linear head.
pub(super) fn work(
    head: &LinearHead,
    context: i32,
    model: &Model,
) -> Result<RequestedWork, RequestError> {
    let trained = head.content.context;
    let unset = context == pb::Context::Unspecified as i32;
    if !unset && convert::context(context)? != trained {
        return Err(RequestError::HeadContext {
            head: head.name.clone(),
            trained: pb::Context::from(trained).as_str_name(),
        });
    }
    let (layer, norm) = (head.content.layer, head.content.norm);
    let want = model
        .features(&[layer], norm)
        .ok_or_else(|| RequestError::LayersMissing {
            given: vec![layer],
            served: convert::served(&model.layers_served(norm)),
        })?;
    Ok(RequestedWork::Infer {
        context: trained,
        want,
    })
}

/// Returns the options of preprocessing of a call: those that the call gives,
/// or else those with which the head was trained, or else the defaults.
///
/// # Errors
///
/// When the head was trained with other options than the call gives.
pub(super) fn preprocess(
    head: Option<&LinearHead>,
    given: Option<&pb::Preprocess>,
) -> Result<PreprocessOptions, RequestError> {
    let Some(head) = head else {
        return convert::preprocess(given);
    };
    let (fit, alpha) = convert::preprocess_given(given)?;
    let refuse = |field, trained| RequestError::HeadPreprocess {
        field,
        head: head.name.clone(),
        trained,
    };
    let content = &head.content;
    Ok(PreprocessOptions {
        fit: agreed(fit, content.fit)
            .map_err(|trained| refuse("preprocess.fit", pb::Fit::from(trained).as_str_name()))?
            .unwrap_or_default(),
        alpha: agreed(alpha, content.alpha)
            .map_err(|trained| refuse("preprocess.alpha", pb::Alpha::from(trained).as_str_name()))?
            .unwrap_or_default(),
    })
}

/// Returns the value of the call or else that of the head; the error is the
/// head's value where they differ.
fn agreed<T: Copy + PartialEq>(given: Option<T>, trained: Option<T>) -> Result<Option<T>, T> {
    match (given, trained) {
        (Some(given), Some(trained)) if given != trained => Err(trained),
        (given, trained) => Ok(given.or(trained)),
    }
}

/// Converts a head for GetModel.
pub(super) fn info(head: &LinearHead) -> pb::Head {
    let content = &head.content;
    pb::Head {
        name: head.name.clone(),
        labels: content.labels.clone(),
        activation: convert::activation(content.activation).into(),
        layer: content.layer,
        norm: pb::Norm::from(content.norm).into(),
        context: pb::Context::from(content.context).into(),
        fit: content
            .fit
            .map_or(pb::Fit::Unspecified, pb::Fit::from)
            .into(),
        alpha: content
            .alpha
            .map_or(pb::Alpha::Unspecified, pb::Alpha::from)
            .into(),
        weights_digest: content.weights_digest.clone().unwrap_or_default(),
        digest: head.digest.clone(),
    }
}
