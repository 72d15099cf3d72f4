//! Parameters of requests and of their outputs: the protocol's and the worker's
//! own.
//!
//! Unknown parameters are ignored, since load tools and gateways send their
//! own; a known parameter with an invalid value is an error.

use std::collections::HashMap;
use std::time::Duration;

use crate::excerpt::Excerpt;
use crate::imaging::{Alpha, Fit, PreprocessOptions};
use crate::model::head::LinearHead;
use crate::proto::inference::InferParameter;
use crate::proto::inference::infer_parameter::ParameterChoice;
use crate::proto::{Priority, pb};
use crate::serve::rpc::error::RequestError;
use crate::serve::rpc::{convert, heads};

type Parameters = HashMap<String, InferParameter>;

/// Parameters of a request as a whole.
#[derive(Debug, Default)]
pub(super) struct RequestParameters {
    pub(super) class: Option<Priority>,
    pub(super) timeout: Option<Duration>,
    /// True if the other images keep their answers when some images fail.
    pub(super) partial: bool,
    /// True if a response of a stream should be marked as the only one.
    pub(super) marks_final: bool,
    pub(super) preprocess: pb::Preprocess,
}

/// Parameters that may differ between outputs; enums are numbers of the
/// contract.
#[derive(Debug, Clone, Default)]
pub(super) struct OutputOptions {
    pub(super) layers: Vec<u32>,
    pub(super) norm: i32,
    pub(super) context: i32,
    pub(super) pooling: i32,
    pub(super) normalize: bool,
    pub(super) dtype: i32,
    pub(super) head: String,
    /// Number of best classes to name, instead of all logits.
    pub(super) n_classes: Option<usize>,
}

const FITS: [(&str, pb::Fit); 2] = [
    ("squash", pb::Fit::Squash),
    ("center_crop", pb::Fit::CenterCrop),
];
const ALPHAS: [(&str, pb::Alpha); 2] = [("drop", pb::Alpha::Drop), ("white", pb::Alpha::White)];
const NORMS: [(&str, pb::Norm); 2] = [
    ("pre_attn_rms", pb::Norm::PreAttnRms),
    ("none", pb::Norm::None),
];
const CONTEXTS: [(&str, pb::Context); 2] = [
    ("raw", pb::Context::Raw),
    ("sos_shifted", pb::Context::SosShifted),
];
const POOLINGS: [(&str, pb::Pooling); 2] =
    [("mean", pb::Pooling::Mean), ("last", pb::Pooling::Last)];
const DTYPES: [(&str, pb::DataType); 2] =
    [("fp32", pb::DataType::F32), ("fp16", pb::DataType::F16)];

/// Returns the options of preprocessing of a request with `n_outputs` outputs,
/// and the same again if a linear head decides them. All outputs have the same
/// options, since an image becomes tokens once.
pub(super) fn preprocess(
    given: pb::Preprocess,
    head: Option<&LinearHead>,
    n_outputs: usize,
) -> Result<(PreprocessOptions, Option<PreprocessOptions>), RequestError> {
    let applied = heads::preprocess(head, Some(&given))?;
    let Some(head) = head.filter(|head| head.content.preprocess_is_set()) else {
        return Ok((applied, None));
    };
    let others = convert::preprocess(Some(&given))?;
    let refuse = |field, trained, other| RequestError::OptionInvalid {
        field,
        problem: format!(
            "the head {} was trained with {trained}, and the other outputs have {other} by \
             default; set {field} to {trained} for the whole request, or ask for the logits alone",
            head.name
        ),
    };
    if n_outputs > 1 && applied.fit != others.fit {
        let [trained, other] = [applied.fit, others.fit].map(fit_name);
        return Err(refuse("fit", trained, other));
    }
    if n_outputs > 1 && applied.alpha != others.alpha {
        let [trained, other] = [applied.alpha, others.alpha].map(alpha_name);
        return Err(refuse("alpha", trained, other));
    }
    Ok((applied, Some(applied)))
}

/// Returns the name of a fit as a parameter has it.
pub(super) fn fit_name(fit: Fit) -> &'static str {
    name(pb::Fit::from(fit), &FITS)
}

/// Returns the name of an alpha as a parameter has it.
pub(super) fn alpha_name(alpha: Alpha) -> &'static str {
    name(pb::Alpha::from(alpha), &ALPHAS)
}

fn name<T: Copy + PartialEq>(value: T, choices: &[(&'static str, T)]) -> &'static str {
    let found = choices.iter().find(|(_, choice)| *choice == value);
    found.map_or("", |(name, _)| name)
}

/// Beginning of the parameters by which clients of Triton on the same machine
/// place a tensor into shared memory. Ignoring them would leave such a client
/// with whatever its memory held before.
const SHARED_MEMORY: &str = "shared_memory_";

/// Names of parameters that only a whole request may have.
const OF_REQUESTS: [&str; 5] = ["priority", "timeout", "partial", "fit", "alpha"];

/// Reads the parameters of a request, and the options that hold for all its
/// outputs.
pub(super) fn of_request(
    parameters: &Parameters,
) -> Result<(RequestParameters, OutputOptions), RequestError> {
    let (mut manner, mut options) = (RequestParameters::default(), OutputOptions::default());
    for (name, parameter) in parameters {
        match name.as_str() {
            "priority" => manner.class = class(whole("priority", parameter)?)?,
            "timeout" => {
                // In the protocol, 0 means no timeout.
                manner.timeout = Some(whole("timeout", parameter)?)
                    .filter(|&time| time > 0)
                    .map(Duration::from_micros);
            }
            "partial" => manner.partial = truth("partial", parameter)?,
            "fit" => manner.preprocess.fit = choice("fit", parameter, &FITS)?.into(),
            "alpha" => manner.preprocess.alpha = choice("alpha", parameter, &ALPHAS)?.into(),
            "triton_enable_empty_final_response" => {
                manner.marks_final = matches!(
                    parameter.parameter_choice,
                    Some(ParameterChoice::BoolParam(true))
                );
            }
            name if options.set(name, parameter)? => {}
            name => ignored(name),
        }
    }
    Ok((manner, options))
}

/// Returns the request's options, overridden by the parameters of one output.
pub(super) fn of_output(
    options: &OutputOptions,
    parameters: &Parameters,
) -> Result<OutputOptions, RequestError> {
    let mut options = options.clone();
    for (name, parameter) in parameters {
        refuse_misplaced(name)?;
        if !options.set(name, parameter)? {
            ignored(name);
        }
    }
    Ok(options)
}

/// Checks the parameters of an input, which may have none of the worker's own.
pub(super) fn of_input(parameters: &Parameters) -> Result<(), RequestError> {
    for (name, parameter) in parameters {
        refuse_misplaced(name)?;
        if OutputOptions::default().set(name, parameter)? {
            return Err(misplaced(name));
        }
        ignored(name);
    }
    Ok(())
}

fn refuse_misplaced(name: &str) -> Result<(), RequestError> {
    if name.starts_with(SHARED_MEMORY) {
        return Err(invalid(
            "parameters",
            format!(
                "{}: the worker has no shared memory with its clients; leave the parameter out, \
                 and tensors travel in the messages",
                Excerpt::of(name)
            ),
        ));
    }
    if OF_REQUESTS.contains(&name) {
        return Err(misplaced(name));
    }
    Ok(())
}

fn misplaced(name: &str) -> RequestError {
    let name = Excerpt::of(name);
    RequestError::OptionInvalid {
        field: "parameters",
        problem: format!("{name} is a parameter of the request, not of this tensor"),
    }
}

fn ignored(name: &str) {
    tracing::debug!(name = ?Excerpt::of(name), "ignored an unknown parameter");
}

impl OutputOptions {
    /// Sets an option from a parameter; returns false if the name is unknown.
    fn set(&mut self, name: &str, parameter: &InferParameter) -> Result<bool, RequestError> {
        match name {
            "layer" => self.layers = layers(parameter)?,
            "norm" => self.norm = choice("norm", parameter, &NORMS)?.into(),
            "context" => self.context = choice("context", parameter, &CONTEXTS)?.into(),
            "pooling" => self.pooling = choice("pooling", parameter, &POOLINGS)?.into(),
            "normalize" => self.normalize = truth("normalize", parameter)?,
            "dtype" => self.dtype = choice("dtype", parameter, &DTYPES)?.into(),
            "head" => text("head", parameter)?.clone_into(&mut self.head),
            "classification" => {
                let n_classes = whole("classification", parameter)?;
                // Clients that want no class names send 0.
                self.n_classes =
                    (n_classes > 0).then(|| usize::try_from(n_classes).unwrap_or(usize::MAX));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Converts a priority level: 1 is the most urgent, and 0 is the default, as in
/// Triton.
fn class(priority: u64) -> Result<Option<Priority>, RequestError> {
    match priority {
        0 => Ok(None),
        1 => Ok(Some(Priority::Interactive)),
        2 => Ok(Some(Priority::Bulk)),
        other => Err(invalid(
            "priority",
            format!("{other} is not a level; use 1 (interactive), 2 (bulk) or 0 (the default)"),
        )),
    }
}

fn invalid(field: &'static str, problem: String) -> RequestError {
    RequestError::OptionInvalid { field, problem }
}

fn whole(field: &'static str, parameter: &InferParameter) -> Result<u64, RequestError> {
    match parameter.parameter_choice {
        Some(ParameterChoice::Uint64Param(value)) => Ok(value),
        Some(ParameterChoice::Int64Param(value)) => {
            u64::try_from(value).map_err(|_| invalid(field, format!("{value} is negative")))
        }
        _ => Err(invalid(field, "it must be an int64_param".to_owned())),
    }
}

fn truth(field: &'static str, parameter: &InferParameter) -> Result<bool, RequestError> {
    match parameter.parameter_choice {
        Some(ParameterChoice::BoolParam(value)) => Ok(value),
        _ => Err(invalid(field, "it must be a bool_param".to_owned())),
    }
}

fn text<'a>(field: &'static str, parameter: &'a InferParameter) -> Result<&'a str, RequestError> {
    match &parameter.parameter_choice {
        Some(ParameterChoice::StringParam(value)) => Ok(value),
        _ => Err(invalid(field, "it must be a string_param".to_owned())),
    }
}

fn choice<T: Copy>(
    field: &'static str,
    parameter: &InferParameter,
    choices: &[(&str, T)],
) -> Result<T, RequestError> {
    let given = text(field, parameter)?;
    let known = choices
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(given));
    if let Some(&(_, value)) = known {
        return Ok(value);
    }
    let names: Vec<&str> = choices.iter().map(|&(name, _)| name).collect();
    let given = Excerpt::of(given);
    Err(invalid(
        field,
        format!("{given:?} is not one of {}", names.join(", ")),
    ))
}

/// Reads one layer as a number, or several as text such as "4,8".
fn layers(parameter: &InferParameter) -> Result<Vec<u32>, RequestError> {
    let refuse = |given: &str| {
        let given = Excerpt::of(given);
        invalid(
            "layer",
            format!("{given:?} is neither a layer's number nor a comma-separated list of them"),
        )
    };
    if let Some(ParameterChoice::StringParam(list)) = &parameter.parameter_choice {
        return list
            .split(',')
            .map(|layer| layer.trim().parse().map_err(|_| refuse(list)))
            .collect();
    }
    let layer = whole("layer", parameter)?;
    Ok(vec![
        u32::try_from(layer).map_err(|_| refuse(&layer.to_string()))?,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(list: &[(&str, ParameterChoice)]) -> Parameters {
        list.iter()
            .map(|(name, choice)| {
                let parameter_choice = Some(choice.clone());
                ((*name).to_owned(), InferParameter { parameter_choice })
            })
            .collect()
    }

    fn word(text: &str) -> ParameterChoice {
        ParameterChoice::StringParam(text.to_owned())
    }

    #[test]
    fn ours_are_taken_and_others_ignored() {
        let given = parameters(&[
            ("fit", word("CENTER_CROP")),
            ("layer", word("1, 3")),
            ("dtype", word("FP16")),
            ("timeout", ParameterChoice::Int64Param(1500)),
            ("priority", ParameterChoice::Uint64Param(2)),
            ("headers", word("anything")),
            (
                "triton_enable_empty_final_response",
                ParameterChoice::BoolParam(true),
            ),
        ]);
        let (manner, options) = of_request(&given).expect("good ones");
        assert_eq!(manner.preprocess.fit, i32::from(pb::Fit::CenterCrop));
        assert_eq!(manner.timeout, Some(Duration::from_micros(1500)));
        assert_eq!(manner.class, Some(Priority::Bulk));
        assert!(manner.marks_final && !manner.partial);
        assert_eq!(options.layers, [1, 3]);
        let output = parameters(&[
            ("layer", ParameterChoice::Int64Param(2)),
            ("classification", ParameterChoice::Int64Param(0)),
        ]);
        let output = of_output(&options, &output).expect("good ones");
        assert_eq!(output.layers, [2]);
        assert_eq!(output.dtype, i32::from(pb::DataType::F16));
        assert_eq!(output.n_classes, None);
    }

    #[test]
    fn levels_of_priority_are_those_of_the_classes() {
        let read = |choice| of_request(&parameters(&[("priority", choice)]));
        for (level, expected) in [
            (0, None),
            (1, Some(Priority::Interactive)),
            (2, Some(Priority::Bulk)),
        ] {
            for choice in [
                ParameterChoice::Uint64Param(level),
                ParameterChoice::Int64Param(level.cast_signed()),
            ] {
                assert_eq!(read(choice).expect("a level").0.class, expected);
            }
        }
        for choice in [
            ParameterChoice::Uint64Param(3),
            ParameterChoice::Uint64Param(u64::MAX),
            ParameterChoice::Int64Param(-1),
            ParameterChoice::Int64Param(i64::MAX),
            ParameterChoice::DoubleParam(1.0),
            word("1"),
        ] {
            let error = read(choice).expect_err("no level").to_string();
            assert!(error.starts_with("priority: "), "{error}");
        }
    }

    #[test]
    fn shared_memory_is_refused() {
        for (name, value) in [
            ("shared_memory_region", word("pictures")),
            ("shared_memory_offset", ParameterChoice::Int64Param(0)),
            ("shared_memory_byte_size", ParameterChoice::Int64Param(64)),
        ] {
            let given = parameters(&[(name, value)]);
            let output = of_output(&OutputOptions::default(), &given).expect_err("an output's");
            let input = of_input(&given).expect_err("an input's");
            for error in [output.to_string(), input.to_string()] {
                let words = format!("parameters: {name}: the worker has no shared memory");
                assert!(error.starts_with(&words), "{error}");
            }
        }
    }

    #[test]
    fn ours_with_bad_values_are_refused() {
        let check = |name, value, words: &str| {
            let error = of_request(&parameters(&[(name, value)])).expect_err(words);
            assert!(error.to_string().contains(words), "{error}");
        };
        check(
            "fit",
            word("stretch"),
            "fit: \"stretch\" is not one of squash",
        );
        check("alpha", ParameterChoice::BoolParam(true), "string_param");
        check("partial", word("true"), "bool_param");
        check("timeout", ParameterChoice::Int64Param(-1), "-1 is negative");
        check("timeout", word("5"), "int64_param");
        check("layer", word("1;2"), "neither a layer's number");
        check(
            "layer",
            ParameterChoice::Int64Param(1 << 40),
            "neither a layer's",
        );
        let output = parameters(&[("fit", word("squash"))]);
        let error = of_output(&OutputOptions::default(), &output).expect_err("the request's");
        assert!(
            error
                .to_string()
                .contains("fit is a parameter of the request"),
            "{error}"
        );
        let input = parameters(&[("layer", ParameterChoice::Int64Param(1))]);
        of_input(&input).expect_err("not an input's");
        of_input(&parameters(&[(
            "binary_data",
            ParameterChoice::BoolParam(true),
        )]))
        .expect("ignored");
    }
}
