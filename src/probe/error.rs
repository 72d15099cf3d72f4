//! Errors of a probe: the thing, its value, the limit, and what to change.

use super::{CLASSES_MAX, WEIGHTS_MAX};

/// Reason why a probe cannot be fitted or measured.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ProbeError {
    #[error("features have no rows: give at least one example")]
    NoRows,
    #[error("features have rows of 0 numbers: give at least one column")]
    NoColumns,
    #[error(
        "features hold {numbers} numbers, which are not {rows} rows of {width}: give whole rows"
    )]
    Size {
        numbers: usize,
        rows: usize,
        width: usize,
    },
    #[error(
        "features of {rows} rows of {width} numbers begin at byte {offset} of a mapping of {bytes} \
         bytes and do not fit: give a whole file"
    )]
    Mapping {
        rows: usize,
        width: usize,
        offset: usize,
        bytes: usize,
    },
    #[error(
        "features begin at address {address} of a mapping, which is no multiple of {alignment}: \
         align the numbers in the file to {alignment} bytes"
    )]
    Alignment { address: usize, alignment: usize },
    #[error(
        "features have {value} in row {row}, column {column}: remove the example or compute its \
         features again"
    )]
    NotFinite {
        row: usize,
        column: usize,
        value: f32,
    },
    #[error(
        "features of layer {layer} have {rows} rows, and the labels have {labels}: give one label \
         per row"
    )]
    Rows {
        layer: u32,
        rows: usize,
        labels: usize,
    },
    #[error(
        "features have rows of {width} numbers, and {expected} are expected: give features of one \
         layer of one model"
    )]
    Width { width: usize, expected: usize },
    #[error("row {row} is not among the {rows} rows of the features: give rows below {rows}")]
    RowOutside { row: usize, rows: usize },
    #[error("labels have no name of a class: give at least two classes")]
    NoClasses,
    #[error(
        "labels have {classes} classes, over the limit of {CLASSES_MAX}: merge classes or keep the \
         most frequent"
    )]
    ClassesOverLimit { classes: usize },
    #[error(
        "the probe has {classes} classes of {width} features, {} weights, over the limit of \
         {WEIGHTS_MAX}: use fewer classes or a narrower layer",
        classes * width
    )]
    WeightsOverLimit { classes: usize, width: usize },
    #[error(
        "the label of row {row} is class {class}, and there are {classes}: give one below {classes}"
    )]
    LabelOutside {
        row: usize,
        class: usize,
        classes: usize,
    },
    #[error(
        "labels of {rows} rows of {labels} labels would be {} values, and {values} are given: give \
         one value per row and label",
        rows * labels
    )]
    LabelValues {
        rows: usize,
        labels: usize,
        values: usize,
    },
    #[error("labels have one class, {class:?}: give examples of at least two classes")]
    OneClass { class: String },
    #[error(
        "class {class:?} has 1 example, and a split needs at least 2: add examples or remove the \
         class"
    )]
    OneExample { class: String },
    #[error(
        "class {class:?} has no example in the training part: add examples or move some to \
         training"
    )]
    NotInTraining { class: String },
    #[error(
        "label {label:?} is {value} in all examples of the training part: add examples where it \
         is not, or remove the label"
    )]
    OneValue { label: String, value: bool },
    #[error("the share of {part} is {share}: it must be 0 or more, and both shares below 1")]
    Share { part: &'static str, share: f64 },
    #[error(
        "the groups are {groups}, and the labels have {rows} rows: give the group of every row"
    )]
    Groups { groups: usize, rows: usize },
    #[error(
        "the split gives a part to {parts} rows, and the labels have {rows} rows: give the part of \
         every row"
    )]
    Parts { parts: usize, rows: usize },
    #[error(
        "the validation part is empty, and {fits} fits are to be compared by it: raise its share \
         or give one layer and one strength"
    )]
    NoValidation { fits: usize },
    #[error("the plan has no {what}: give at least one")]
    EmptyPlan { what: &'static str },
    #[error("strength {strength} of the plan: a strength is finite and above 0")]
    Strength { strength: f64 },
    #[error("tolerance {tolerance}: it must be finite and above 0")]
    Tolerance { tolerance: f64 },
    #[error(
        "class weights have {weights} values, and there are {classes} classes: give one per class"
    )]
    WeightCount { weights: usize, classes: usize },
    #[error("the weight of class {class:?} is {weight}: a weight is finite and above 0")]
    ClassWeight { class: String, weight: f64 },
    #[error(
        "the weight of class {class} for column {column} is {weight}, which no f32 holds: remove the \
         column or fit with a smaller strength"
    )]
    WeightOverflow {
        class: usize,
        column: usize,
        weight: f64,
    },
    #[error("image {image} has {tokens} tokens, and {expected} are expected: use one model")]
    Tokens {
        image: usize,
        tokens: usize,
        expected: usize,
    },
    #[error(
        "image {image} has token {token}, and the palette has {colors} colors: use the palette of \
         the model that made the tokens"
    )]
    Color {
        image: usize,
        token: u16,
        colors: usize,
    },
}
