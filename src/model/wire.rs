//! Scans the bytes of an ONNX graph without decoding its messages into values.
//!
//! Graphs are untrusted files of up to 2 GiB, and only three facts about them
//! are needed: the files that hold their tensors, the tensors that only the
//! worker's own operators read, and whether an operator mixes the images of a
//! batch. So the bytes are scanned in place; only names are copied,
//! and all memory is bounded by the constants below, each with its reason.
//!
//! Field numbers are those of `onnx.proto`.

use std::collections::HashSet;

use super::onnx::IMAGEGPT;

/// Deepest nesting of messages, the limit of protobuf's own readers too.
const DEPTH_MAX: usize = 100;
/// Largest number of tensors in other files; imagegpt-large has 700.
const EXTERNAL_MAX: usize = 100_000;
/// Largest number of dimensions of a tensor; operators support at most 8.
const DIMENSIONS_MAX: usize = 32;
/// Longest name, in bytes; real names are far shorter.
const NAME_BYTES_MAX: usize = 4096;
/// Largest graph in bytes, which is protobuf's limit for a message.
pub(crate) const GRAPH_BYTES_MAX: u64 = (1 << 31) - 1;

/// Operators that choose one scale for their whole input, so that an image's
/// numbers depend on the other images of its batch. The last operator takes the
/// scale that another one chose.
const BATCH_SCALED: [&str; 4] = [
    "DynamicQuantizeLinear",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
    "MatMulIntegerToFloat",
];
const QUANTIZE: &str = "QuantizeLinear";

/// A tensor whose bytes are in another file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct ExternalTensor {
    pub(crate) name: String,
    /// Name of the file, as it is written in the graph.
    pub(crate) location: String,
    pub(crate) offset: u64,
    /// Length in bytes; `None` if it follows from the shape.
    pub(crate) length: Option<u64>,
    pub(crate) data_type: i32,
    pub(crate) dims: Vec<i64>,
    /// True if the tensor is in a graph within the graph, or in a function.
    pub(crate) is_nested: bool,
    /// True if only operators of [`IMAGEGPT`] read the tensor.
    pub(crate) is_packed: bool,
}

impl ExternalTensor {
    /// Returns the number of bytes that the tensor takes in its file.
    pub(crate) fn bytes(&self) -> Result<u64, String> {
        let elements = self.dims.iter().try_fold(1_u64, |product, &size| {
            product.checked_mul(u64::try_from(size).ok()?)
        });
        let elements = elements
            .ok_or_else(|| format!("the tensor {} has the shape {:?}", self.name, self.dims))?;
        let of_shape = element_bits(self.data_type)
            .and_then(|bits| elements.checked_mul(bits))
            .map(|bits| bits.div_ceil(8));
        match (self.length, of_shape) {
            (Some(given), Some(needed)) if given != needed => Err(format!(
                "the tensor {} has a length of {given} bytes, but its shape takes {needed}",
                self.name
            )),
            (Some(given), _) => Ok(given),
            (None, Some(needed)) => Ok(needed),
            (None, None) => Err(format!(
                "the tensor {} has no length, and its type {} is unknown",
                self.name, self.data_type
            )),
        }
    }

    /// Returns the range of the tensor's bytes in a file of `file_bytes` bytes.
    pub(crate) fn range(&self, file_bytes: u64) -> Result<std::ops::Range<usize>, String> {
        let length = self.bytes()?;
        let end = self.offset.checked_add(length);
        let range = end
            .filter(|&end| end <= file_bytes)
            .and_then(|end| Some(usize::try_from(self.offset).ok()?..usize::try_from(end).ok()?));
        range.ok_or_else(|| {
            format!(
                "the tensor {} takes {length} bytes from offset {}, but {} has {file_bytes}",
                self.name, self.offset, self.location
            )
        })
    }
}

/// Returns the size of an element of a `TensorProto.DataType`, in bits.
fn element_bits(data_type: i32) -> Option<u64> {
    Some(match data_type {
        // Bool, int8, uint8 and the floats of 8 bits.
        2 | 3 | 9 | 17..=20 | 24 => 8,
        4 | 5 | 10 | 16 => 16,
        1 | 6 | 12 => 32,
        7 | 11 | 13 | 14 => 64,
        15 => 128,
        21..=23 => 4,
        25 | 26 => 2,
        _ => return None,
    })
}

/// Facts about a graph.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct GraphSummary {
    pub(crate) external: Vec<ExternalTensor>,
    /// Operator that mixes the images of a batch, if the graph has one.
    pub(crate) batch_scaled: Option<&'static str>,
    /// Number of images of each run, if the graph's inputs have a fixed size
    /// where others have a name.
    pub(crate) batch_fixed: Option<u64>,
}

/// Scans a graph.
///
/// # Errors
///
/// When the bytes are not an ONNX graph or exceed a limit.
pub(crate) fn look(graph: &[u8]) -> Result<GraphSummary, String> {
    let mut walk = Walk::default();
    walk.message(Kind::Model, graph, Place::default())?;
    Ok(walk.summary())
}

/// Replacement in a graph for a tensor that is in another file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Substitute {
    Keep,
    /// The bytes themselves.
    Inline(Vec<u8>),
    /// Another file or offset.
    Elsewhere {
        location: String,
        offset: u64,
    },
}

/// Function that chooses the replacement of a tensor.
pub(crate) type Substitution<'a> = &'a dyn Fn(&ExternalTensor) -> Result<Substitute, String>;

/// Returns a copy of the graph with replaced tensors; `None` if all are kept.
///
/// # Errors
///
/// When [`look`] fails, `substitution` fails, or the copy would be larger than
/// protobuf allows.
pub(crate) fn rewrite(
    graph: &[u8],
    substitution: Substitution<'_>,
) -> Result<Option<Vec<u8>>, String> {
    let mut walk = Walk {
        substitution: Some(substitution),
        ..Walk::default()
    };
    walk.message(Kind::Model, graph, Place::default())
}

/// Kinds of messages that contain tensors or nodes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Model,
    Training,
    Function,
    Graph,
    Node,
    Attribute,
    Sparse,
    Tensor,
}

impl Kind {
    /// Returns the kind of a field's message; `None` for all other fields.
    fn child(self, field: u64) -> Option<Self> {
        Some(match (self, field) {
            (Self::Model, 7) | (Self::Training, 1 | 2) | (Self::Attribute, 6 | 11) => Self::Graph,
            (Self::Model, 20) => Self::Training,
            (Self::Model, 25) => Self::Function,
            (Self::Function, 7) | (Self::Graph, 1) => Self::Node,
            (Self::Function, 11) | (Self::Node, 5) => Self::Attribute,
            (Self::Graph, 5) | (Self::Attribute, 5 | 10) | (Self::Sparse, 1 | 2) => Self::Tensor,
            (Self::Graph, 15) | (Self::Attribute, 22 | 23) => Self::Sparse,
            _ => return None,
        })
    }
}

#[derive(Clone, Copy, Default)]
struct Place {
    depth: usize,
    is_nested: bool,
}

#[derive(Default)]
struct Walk<'a> {
    external: Vec<ExternalTensor>,
    batch_scaled: Option<&'static str>,
    batch_fixed: Option<u64>,
    /// Names of values that do not change from run to run.
    constants: HashSet<&'a [u8]>,
    /// Names of the scales of `QuantizeLinear` nodes.
    scales: Vec<&'a [u8]>,
    /// Names of the values that operators of other domains than [`IMAGEGPT`]
    /// read, and of the graph's outputs.
    read: HashSet<&'a [u8]>,
    substitution: Option<Substitution<'a>>,
}

impl<'a> Walk<'a> {
    fn summary(self) -> GraphSummary {
        let constants = &self.constants;
        let is_found = |scale: &&[u8]| !constants.contains(scale);
        let found = self.scales.iter().any(is_found).then_some(QUANTIZE);
        let mut external = self.external;
        for tensor in &mut external {
            tensor.is_packed = !self.read.contains(tensor.name.as_bytes());
        }
        GraphSummary {
            batch_scaled: self.batch_scaled.or(found),
            batch_fixed: self.batch_fixed,
            external,
        }
    }

    /// Scans a message; returns its new bytes if a tensor in it was replaced.
    fn message(
        &mut self,
        kind: Kind,
        bytes: &'a [u8],
        place: Place,
    ) -> Result<Option<Vec<u8>>, String> {
        match kind {
            Kind::Tensor => return self.tensor(bytes, place),
            Kind::Node => self.node(bytes)?,
            _ => {}
        }
        if place.depth > DEPTH_MAX {
            return Err(format!("has messages nested more than {DEPTH_MAX} deep"));
        }
        let mut changed = Vec::new();
        let mut kept = 0;
        let mut fields = Fields::new(bytes);
        while let Some(field) = fields.next()? {
            if let (Kind::Graph, GRAPH_OUTPUT, Content::Bytes(output)) =
                (kind, field.number, field.content)
            {
                self.read.insert(value_name(output)?);
            }
            if let (Kind::Graph, GRAPH_INPUT, Content::Bytes(input), false) =
                (kind, field.number, field.content, place.is_nested)
            {
                self.batch_fixed = self.batch_fixed.or(first_size(input)?);
            }
            let (Some(child), Content::Bytes(content)) = (kind.child(field.number), field.content)
            else {
                continue;
            };
            let within = Place {
                depth: place.depth + 1,
                is_nested: place.is_nested
                    || kind == Kind::Attribute && child == Kind::Graph
                    || matches!(child, Kind::Function | Kind::Training),
            };
            if kind == Kind::Graph && child == Kind::Tensor {
                self.constants.insert(name_of(content)?);
            }
            if let Some(other) = self.message(child, content, within)? {
                changed.extend_from_slice(&bytes[kept..field.start]);
                put_field(&mut changed, field.number, &other);
                kept = field.end;
                check_size(changed.len())?;
            }
        }
        if kept == 0 {
            return Ok(None);
        }
        changed.extend_from_slice(&bytes[kept..]);
        check_size(changed.len())?;
        Ok(Some(changed))
    }

    fn node(&mut self, bytes: &'a [u8]) -> Result<(), String> {
        let (mut operator, mut scale, mut n_inputs) = (&bytes[..0], None, 0);
        let mut outputs = Vec::new();
        let mut domain = &bytes[..0];
        let mut fields = Fields::new(bytes);
        while let Some(field) = fields.next()? {
            match (field.number, field.content) {
                (1, Content::Bytes(input)) => {
                    if n_inputs == 1 {
                        scale = Some(input);
                    }
                    n_inputs += 1;
                }
                (2, Content::Bytes(output)) => outputs.push(output),
                (4, Content::Bytes(name)) => operator = name,
                (7, Content::Bytes(name)) => domain = name,
                _ => {}
            }
        }
        if domain != IMAGEGPT.as_bytes() {
            let mut fields = Fields::new(bytes);
            while let Some(field) = fields.next()? {
                if let (1, Content::Bytes(input)) = (field.number, field.content) {
                    self.read.insert(input);
                }
            }
        }
        if operator == b"Constant" {
            self.constants.extend(outputs);
        } else if operator == QUANTIZE.as_bytes() {
            self.scales.extend(scale);
        }
        let mut known = BATCH_SCALED.into_iter();
        let found = known.find(|known| known.as_bytes() == operator);
        self.batch_scaled = self.batch_scaled.or(found);
        Ok(())
    }

    fn tensor(&mut self, bytes: &'a [u8], place: Place) -> Result<Option<Vec<u8>>, String> {
        let Some(mut tensor) = external(bytes)? else {
            return Ok(None);
        };
        tensor.is_nested = place.is_nested;
        if let Some(substitution) = self.substitution {
            return Ok(match substitution(&tensor)? {
                Substitute::Keep => None,
                Substitute::Inline(data) => Some(with_raw_data(bytes, &data)?),
                Substitute::Elsewhere { location, offset } => {
                    Some(at(bytes, &location, offset, tensor.bytes()?)?)
                }
            });
        }
        if self.external.len() == EXTERNAL_MAX {
            return Err(format!(
                "has more than {EXTERNAL_MAX} tensors in other files"
            ));
        }
        self.external.push(tensor);
        Ok(None)
    }
}

const GRAPH_OUTPUT: u64 = 12;
const GRAPH_INPUT: u64 = 11;
/// Fields on the way from a value to the first size of its shape: its type, the
/// tensor's type, the shape.
const TO_SHAPE: [u64; 3] = [2, 1, 2];
/// Input whose first size is the number of images per run.
const INPUT_IDS: &[u8] = b"input_ids";
const VALUE_NAME: u64 = 1;
const TENSOR_NAME: u64 = 8;
const TENSOR_RAW_DATA: u64 = 9;
const TENSOR_EXTERNAL_DATA: u64 = 13;
const TENSOR_DATA_LOCATION: u64 = 14;

fn name_of(tensor: &[u8]) -> Result<&[u8], String> {
    last_bytes(tensor, TENSOR_NAME)
}

fn value_name(value: &[u8]) -> Result<&[u8], String> {
    last_bytes(value, VALUE_NAME)
}

/// Returns the first size of the tokens' input; `None` for other inputs, and if
/// the size is not fixed.
fn first_size(input: &[u8]) -> Result<Option<u64>, String> {
    if value_name(input)? != INPUT_IDS {
        return Ok(None);
    }
    let mut shape = input;
    for number in TO_SHAPE {
        shape = last_bytes(shape, number)?;
    }
    let mut sizes = Fields::new(shape);
    let Some(first) = sizes.next()? else {
        return Ok(None);
    };
    let (1, Content::Bytes(size)) = (first.number, first.content) else {
        return Ok(None);
    };
    let mut size = Fields::new(size);
    while let Some(field) = size.next()? {
        if let (1, Content::Number(size)) = (field.number, field.content) {
            // Some exporters write 0 or -1 for a size that is not fixed.
            return Ok((1..=i64::MAX.cast_unsigned())
                .contains(&size)
                .then_some(size));
        }
    }
    Ok(None)
}

/// Returns the bytes of a field; none if the message lacks the field. As in
/// protobuf, the last of several counts.
fn last_bytes(message: &[u8], number: u64) -> Result<&[u8], String> {
    let mut bytes = &message[..0];
    let mut fields = Fields::new(message);
    while let Some(field) = fields.next()? {
        if let Content::Bytes(found) = field.content
            && field.number == number
        {
            bytes = found;
        }
    }
    Ok(bytes)
}

/// Reads a tensor; `None` if its bytes are in the graph itself.
fn external(bytes: &[u8]) -> Result<Option<ExternalTensor>, String> {
    let mut tensor = ExternalTensor::default();
    let mut is_external = false;
    let mut entries = Vec::new();
    let mut fields = Fields::new(bytes);
    while let Some(field) = fields.next()? {
        match (field.number, field.content) {
            (1, Content::Number(size)) => push_dim(&mut tensor.dims, size)?,
            (1, Content::Bytes(packed)) => {
                let mut packed = Fields::new(packed);
                while !packed.rest().is_empty() {
                    push_dim(&mut tensor.dims, packed.number()?)?;
                }
            }
            (2, Content::Number(number)) => {
                tensor.data_type = i32::try_from(number).unwrap_or(0);
            }
            (TENSOR_NAME, Content::Bytes(name)) => tensor.name = text(name)?,
            (TENSOR_EXTERNAL_DATA, Content::Bytes(entry)) => entries.push(entry),
            (TENSOR_DATA_LOCATION, Content::Number(number)) => is_external = number == 1,
            _ => {}
        }
    }
    if !is_external {
        return Ok(None);
    }
    let mut location = None;
    for entry in entries {
        let (key, value) = entry_of(entry)?;
        let number = |value: &str| {
            value.parse::<u64>().map_err(|_| {
                let name = &tensor.name;
                format!("the tensor {name} has the {key} {value:?}; it must be a number of bytes")
            })
        };
        match &*key {
            // Readers differ in which of two locations they take.
            "location" if location.is_some() => {
                return Err(format!("the tensor {} has two locations", tensor.name));
            }
            "location" => location = Some(value),
            "offset" => tensor.offset = number(&value)?,
            "length" => tensor.length = Some(number(&value)?).filter(|&length| length > 0),
            _ => {}
        }
    }
    tensor.location = location.ok_or_else(|| {
        format!(
            "the tensor {} is in another file, but has no location",
            tensor.name
        )
    })?;
    Ok(Some(tensor))
}

fn push_dim(dims: &mut Vec<i64>, size: u64) -> Result<(), String> {
    if dims.len() == DIMENSIONS_MAX {
        return Err(format!(
            "has a tensor with more than {DIMENSIONS_MAX} dimensions"
        ));
    }
    dims.push(size.cast_signed());
    Ok(())
}

fn entry_of(bytes: &[u8]) -> Result<(String, String), String> {
    let (mut key, mut value) = (String::new(), String::new());
    let mut fields = Fields::new(bytes);
    while let Some(field) = fields.next()? {
        match (field.number, field.content) {
            (1, Content::Bytes(found)) => key = text(found)?,
            (2, Content::Bytes(found)) => value = text(found)?,
            _ => {}
        }
    }
    Ok((key, value))
}

fn text(bytes: &[u8]) -> Result<String, String> {
    if bytes.len() > NAME_BYTES_MAX {
        return Err(format!(
            "has a name of {} bytes; the limit is {NAME_BYTES_MAX}",
            bytes.len()
        ));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "has a name that is not UTF-8")?;
    Ok(text.to_owned())
}

/// Returns a copy of the tensor that contains its bytes itself.
fn with_raw_data(tensor: &[u8], data: &[u8]) -> Result<Vec<u8>, String> {
    check_size(tensor.len().saturating_add(data.len()))?;
    let mut inlined = without_data(tensor)?;
    put_field(&mut inlined, TENSOR_RAW_DATA, data);
    Ok(inlined)
}

/// Returns a copy of the tensor whose bytes are at another place.
fn at(tensor: &[u8], location: &str, offset: u64, length: u64) -> Result<Vec<u8>, String> {
    let mut moved = without_data(tensor)?;
    let (offset, length) = (offset.to_string(), length.to_string());
    for (key, value) in [
        ("location", location),
        ("offset", &offset),
        ("length", &length),
    ] {
        let mut entry = Vec::new();
        put_field(&mut entry, 1, key.as_bytes());
        put_field(&mut entry, 2, value.as_bytes());
        put_field(&mut moved, TENSOR_EXTERNAL_DATA, &entry);
    }
    put_number(&mut moved, TENSOR_DATA_LOCATION << 3);
    put_number(&mut moved, 1);
    Ok(moved)
}

/// Returns a copy of the tensor without its bytes and without their location.
fn without_data(tensor: &[u8]) -> Result<Vec<u8>, String> {
    let mut left = Vec::new();
    let mut fields = Fields::new(tensor);
    while let Some(field) = fields.next()? {
        let data = [TENSOR_EXTERNAL_DATA, TENSOR_DATA_LOCATION, TENSOR_RAW_DATA];
        if !data.contains(&field.number) {
            left.extend_from_slice(&tensor[field.start..field.end]);
        }
    }
    Ok(left)
}

fn check_size(bytes: usize) -> Result<(), String> {
    if bytes as u64 > GRAPH_BYTES_MAX {
        return Err(format!(
            "would be larger than {GRAPH_BYTES_MAX} bytes with the tensors of its inner graphs"
        ));
    }
    Ok(())
}

fn put_field(out: &mut Vec<u8>, number: u64, content: &[u8]) {
    put_number(out, number << 3 | 2);
    put_number(out, content.len() as u64);
    out.extend_from_slice(content);
}

fn put_number(out: &mut Vec<u8>, mut number: u64) {
    loop {
        // The low seven bits.
        let low = (number & 0x7f) as u8;
        number >>= 7;
        if number == 0 {
            return out.push(low);
        }
        out.push(low | 0x80);
    }
}

/// A field of a message.
struct Field<'a> {
    number: u64,
    content: Content<'a>,
    /// Start of the field in the message, with its tag; `end` is its end.
    start: usize,
    end: usize,
}

#[derive(Clone, Copy)]
enum Content<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Fixed,
}

struct Fields<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Fields<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.position..).unwrap_or_default()
    }

    fn next(&mut self) -> Result<Option<Field<'a>>, String> {
        if self.rest().is_empty() {
            return Ok(None);
        }
        let start = self.position;
        let tag = self.number()?;
        let content = match tag & 7 {
            0 => Content::Number(self.number()?),
            1 => self.take(8).map(|_| Content::Fixed)?,
            2 => {
                let length = self.number()?;
                Content::Bytes(self.take(usize::try_from(length).unwrap_or(usize::MAX))?)
            }
            5 => self.take(4).map(|_| Content::Fixed)?,
            _ => return Err(NOT_ONNX.to_owned()),
        };
        Ok(Some(Field {
            number: tag >> 3,
            content,
            start,
            end: self.position,
        }))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let taken = self.rest().get(..length).ok_or(NOT_ONNX)?;
        self.position += length;
        Ok(taken)
    }

    /// Reads a varint: seven bits per byte, at most ten bytes.
    fn number(&mut self) -> Result<u64, String> {
        let mut number = 0;
        for shift in (0..70).step_by(7) {
            let &[byte] = self.take(1)? else {
                return Err(NOT_ONNX.to_owned());
            };
            // Only one bit of the tenth byte counts.
            number |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(NOT_ONNX.to_owned())
    }
}

const NOT_ONNX: &str = "not a graph that ONNX Runtime can load: truncated, or not ONNX";

#[cfg(test)]
#[path = "wire/tests.rs"]
mod tests;
