//! Looks through an ONNX graph's bytes without making values of them.
//!
//! Graphs are other people's files of up to 2 GiB. What is wanted of them is
//! little: which files hold their tensors, and whether an operator mixes the
//! images of a batch. So the bytes are walked as they lie; nothing is copied but
//! names, and what is kept is bounded by constants beside their reasons.
//!
//! Field numbers are those of `onnx.proto`.

use std::collections::HashSet;

/// Messages within messages, as protobuf's own readers have it.
const DEPTH_MAX: usize = 100;
/// Tensors in other files; imagegpt-large has 700.
const EXTERNAL_MAX: usize = 100_000;
/// Dimensions of one of them; operators know of 8 at most.
const DIMENSIONS_MAX: usize = 32;
/// Bytes of a name; what is longer is no name.
const NAME_BYTES_MAX: usize = 4096;
/// Protobuf's own limit for a message.
pub(crate) const GRAPH_BYTES_MAX: u64 = (1 << 31) - 1;

/// Operators that find one scale for all that they are given, so that an image's
/// numbers depend on its company. The last takes the scale that another found.
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
    /// As the graph writes it.
    pub(crate) location: String,
    pub(crate) offset: u64,
    /// `None` where the shape says it.
    pub(crate) length: Option<u64>,
    pub(crate) data_type: i32,
    pub(crate) dims: Vec<i64>,
    /// True if it is in a graph within the graph, or in a function.
    pub(crate) is_nested: bool,
}

impl ExternalTensor {
    /// Bytes that it takes of its file.
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
                "the tensor {} has a length of {given} bytes, and its shape takes {needed}",
                self.name
            )),
            (Some(given), _) => Ok(given),
            (None, Some(needed)) => Ok(needed),
            (None, None) => Err(format!(
                "the tensor {} has no length, and its type {} is not known",
                self.name, self.data_type
            )),
        }
    }

    /// Where its bytes begin and end in a file of so many.
    pub(crate) fn range(&self, file_bytes: u64) -> Result<std::ops::Range<usize>, String> {
        let length = self.bytes()?;
        let end = self.offset.checked_add(length);
        let range = end
            .filter(|&end| end <= file_bytes)
            .and_then(|end| Some(usize::try_from(self.offset).ok()?..usize::try_from(end).ok()?));
        range.ok_or_else(|| {
            format!(
                "the tensor {} takes {length} bytes from {} on, and {} has {file_bytes}",
                self.name, self.offset, self.location
            )
        })
    }
}

/// Bits of an element of `TensorProto.DataType`.
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

/// Facts that a graph states.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct GraphSummary {
    pub(crate) external: Vec<ExternalTensor>,
    /// An operator that mixes the images of a batch.
    pub(crate) batch_scaled: Option<&'static str>,
}

/// Looks through a graph.
///
/// # Errors
///
/// When it is no ONNX graph, or beyond a limit.
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
    /// Another place.
    Elsewhere {
        location: String,
        offset: u64,
    },
}

/// Says what takes a tensor's place.
pub(crate) type Substitution<'a> = &'a dyn Fn(&ExternalTensor) -> Result<Substitute, String>;

/// A copy of the graph with other tensors; `None` if all are kept.
///
/// # Errors
///
/// As for [`look`], when there is no substitute, or when the copy would be larger
/// than protobuf allows.
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

/// The messages that lead to tensors and nodes.
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
    /// Meaning of a field of the message.
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
    /// Names of what does not change from run to run.
    constants: HashSet<&'a [u8]>,
    /// Names of scales.
    scales: Vec<&'a [u8]>,
    substitution: Option<Substitution<'a>>,
}

impl<'a> Walk<'a> {
    fn summary(self) -> GraphSummary {
        let constants = &self.constants;
        let is_found = |scale: &&[u8]| !constants.contains(scale);
        let found = self.scales.iter().any(is_found).then_some(QUANTIZE);
        GraphSummary {
            batch_scaled: self.batch_scaled.or(found),
            external: self.external,
        }
    }

    /// Goes through a message; gives its bytes if they are to be others.
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
            return Err(format!("has messages more than {DEPTH_MAX} deep"));
        }
        let mut changed = Vec::new();
        let mut kept = 0;
        let mut fields = Fields::new(bytes);
        while let Some(field) = fields.next()? {
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
                _ => {}
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

const TENSOR_NAME: u64 = 8;
const TENSOR_RAW_DATA: u64 = 9;
const TENSOR_EXTERNAL_DATA: u64 = 13;
const TENSOR_DATA_LOCATION: u64 = 14;

fn name_of(tensor: &[u8]) -> Result<&[u8], String> {
    let mut name = &tensor[..0];
    let mut fields = Fields::new(tensor);
    while let Some(field) = fields.next()? {
        if let (TENSOR_NAME, Content::Bytes(found)) = (field.number, field.content) {
            name = found;
        }
    }
    Ok(name)
}

/// The tensor, if its bytes are in another file.
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
                format!("the tensor {name} has the {key} {value:?}, which is no number of bytes")
            })
        };
        match &*key {
            // Which of two is meant is for each reader to choose.
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
            "the tensor {} is in another file without a name",
            tensor.name
        )
    })?;
    Ok(Some(tensor))
}

fn push_dim(dims: &mut Vec<i64>, size: u64) -> Result<(), String> {
    if dims.len() == DIMENSIONS_MAX {
        return Err(format!(
            "has a tensor of more than {DIMENSIONS_MAX} dimensions"
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
            "has a name of {} bytes, over {NAME_BYTES_MAX}",
            bytes.len()
        ));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "has a name that is not UTF-8")?;
    Ok(text.to_owned())
}

/// A tensor that has its bytes in itself.
fn with_raw_data(tensor: &[u8], data: &[u8]) -> Result<Vec<u8>, String> {
    check_size(tensor.len().saturating_add(data.len()))?;
    let mut inlined = without_data(tensor)?;
    put_field(&mut inlined, TENSOR_RAW_DATA, data);
    Ok(inlined)
}

/// A tensor whose bytes are in another place.
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

/// A tensor without its bytes, and without where they are.
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
        // Seven bits of it.
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
    /// Where it begins and ends, its tag included.
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

    /// A number of seven bits a byte, ten bytes at most.
    fn number(&mut self) -> Result<u64, String> {
        let mut number = 0;
        for shift in (0..70).step_by(7) {
            let &[byte] = self.take(1)? else {
                return Err(NOT_ONNX.to_owned());
            };
            // The tenth byte has one bit that counts.
            number |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(NOT_ONNX.to_owned())
    }
}

const NOT_ONNX: &str = "not a graph that ONNX Runtime can load: cut short, or no ONNX";

#[cfg(test)]
#[path = "wire/tests.rs"]
mod tests;
