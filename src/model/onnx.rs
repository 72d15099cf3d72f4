//! The part of ONNX's file format that compiled graphs need.
//!
//! Field numbers are those of `onnx.proto`; the other messages of that file
//! would only add unused code.

use half::{bf16, f16};
use prost::{Enumeration, Message};

/// Version of the standard operators (opset) that graphs are written in; 18 is
/// the first version in which reductions take their axes as an input.
pub const OPSET: i64 = 18;
/// Version of ONNX's file format that belongs to the opset.
pub const IR_VERSION: i64 = 9;
/// Domain of ONNX Runtime's fused operators.
pub const MICROSOFT: &str = "com.microsoft";
/// Domain of the worker's own operators.
pub const IMAGEGPT: &str = "imagegpt";

#[derive(Clone, PartialEq, Message)]
pub struct ModelProto {
    #[prost(int64, tag = "1")]
    pub ir_version: i64,
    #[prost(message, repeated, tag = "8")]
    pub opset_import: Vec<OperatorSet>,
    #[prost(string, tag = "2")]
    pub producer_name: String,
    #[prost(string, tag = "3")]
    pub producer_version: String,
    #[prost(message, optional, tag = "7")]
    pub graph: Option<GraphProto>,
}

#[derive(Clone, PartialEq, Message)]
pub struct OperatorSet {
    #[prost(string, tag = "1")]
    pub domain: String,
    #[prost(int64, tag = "2")]
    pub version: i64,
}

#[derive(Clone, PartialEq, Message)]
pub struct GraphProto {
    #[prost(message, repeated, tag = "1")]
    pub node: Vec<NodeProto>,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<TensorProto>,
    #[prost(message, repeated, tag = "11")]
    pub input: Vec<ValueInfoProto>,
    #[prost(message, repeated, tag = "12")]
    pub output: Vec<ValueInfoProto>,
}

#[derive(Clone, PartialEq, Message)]
pub struct NodeProto {
    #[prost(string, repeated, tag = "1")]
    pub input: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub output: Vec<String>,
    #[prost(string, tag = "3")]
    pub name: String,
    #[prost(string, tag = "4")]
    pub op_type: String,
    #[prost(string, tag = "7")]
    pub domain: String,
    #[prost(message, repeated, tag = "5")]
    pub attribute: Vec<AttributeProto>,
}

#[derive(Clone, PartialEq, Message)]
pub struct AttributeProto {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(enumeration = "AttributeType", tag = "20")]
    pub r#type: i32,
    #[prost(float, tag = "2")]
    pub f: f32,
    #[prost(int64, tag = "3")]
    pub i: i64,
    #[prost(bytes = "vec", tag = "4")]
    pub s: Vec<u8>,
    #[prost(float, repeated, tag = "7")]
    pub floats: Vec<f32>,
    #[prost(message, optional, tag = "5")]
    pub t: Option<TensorProto>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Enumeration)]
#[repr(i32)]
pub enum AttributeType {
    Undefined = 0,
    Float = 1,
    Int = 2,
    String = 3,
    Tensor = 4,
    Floats = 6,
}

impl AttributeProto {
    #[must_use]
    pub fn float(name: &str, value: f32) -> Self {
        Self {
            name: name.to_owned(),
            r#type: AttributeType::Float.into(),
            f: value,
            ..Self::default()
        }
    }

    #[must_use]
    pub fn int(name: &str, value: i64) -> Self {
        Self {
            name: name.to_owned(),
            r#type: AttributeType::Int.into(),
            i: value,
            ..Self::default()
        }
    }

    #[must_use]
    pub fn string(name: &str, value: &str) -> Self {
        Self {
            name: name.to_owned(),
            r#type: AttributeType::String.into(),
            s: value.as_bytes().to_vec(),
            ..Self::default()
        }
    }

    #[must_use]
    pub fn floats(name: &str, values: Vec<f32>) -> Self {
        Self {
            name: name.to_owned(),
            r#type: AttributeType::Floats.into(),
            floats: values,
            ..Self::default()
        }
    }

    #[must_use]
    pub fn tensor(name: &str, value: TensorProto) -> Self {
        Self {
            name: name.to_owned(),
            r#type: AttributeType::Tensor.into(),
            t: Some(value),
            ..Self::default()
        }
    }
}

#[derive(Clone, PartialEq, Message)]
pub struct TensorProto {
    #[prost(int64, repeated, tag = "1")]
    pub dims: Vec<i64>,
    #[prost(enumeration = "DataType", tag = "2")]
    pub data_type: i32,
    #[prost(string, tag = "8")]
    pub name: String,
    #[prost(bytes = "vec", tag = "9")]
    pub raw_data: Vec<u8>,
    #[prost(message, repeated, tag = "13")]
    pub external_data: Vec<StringEntry>,
    /// Place of the bytes: 1 if they are in another file, else 0.
    #[prost(int32, tag = "14")]
    pub data_location: i32,
}

impl TensorProto {
    /// Makes a small constant whose bytes are in the graph itself.
    #[must_use]
    pub fn int64s(name: &str, values: &[i64]) -> Self {
        Self {
            dims: vec![i64::try_from(values.len()).unwrap_or(i64::MAX)],
            data_type: DataType::Int64.into(),
            name: name.to_owned(),
            raw_data: values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
            ..Self::default()
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Enumeration)]
#[repr(i32)]
pub enum DataType {
    Undefined = 0,
    Float = 1,
    Uint8 = 2,
    Int8 = 3,
    Int32 = 6,
    Int64 = 7,
    Float16 = 10,
    Bfloat16 = 16,
}

impl DataType {
    /// Returns the bytes of `values` in a tensor of this type; types other than
    /// float16 and bfloat16 give 32-bit floats.
    #[must_use]
    pub fn bytes(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::Float16 => values
                .iter()
                .flat_map(|value| f16::from_f32(*value).to_le_bytes())
                .collect(),
            Self::Bfloat16 => values
                .iter()
                .flat_map(|value| bf16::from_f32(*value).to_le_bytes())
                .collect(),
            _ => values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        }
    }
}

#[derive(Clone, PartialEq, Message)]
pub struct StringEntry {
    #[prost(string, tag = "1")]
    pub key: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct ValueInfoProto {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, optional, tag = "2")]
    pub r#type: Option<Type>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Type {
    #[prost(message, optional, tag = "1")]
    pub tensor_type: Option<TensorType>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TensorType {
    #[prost(enumeration = "DataType", tag = "1")]
    pub elem_type: i32,
    #[prost(message, optional, tag = "2")]
    pub shape: Option<TensorShapeProto>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TensorShapeProto {
    #[prost(message, repeated, tag = "1")]
    pub dim: Vec<Dimension>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Dimension {
    #[prost(oneof = "DimensionValue", tags = "1, 2")]
    pub value: Option<DimensionValue>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum DimensionValue {
    #[prost(int64, tag = "1")]
    Size(i64),
    #[prost(string, tag = "2")]
    Name(String),
}

/// A dimension of a graph's input or output.
#[derive(Clone, Copy, Debug)]
pub enum Dim {
    Name(&'static str),
    Size(usize),
}

impl ValueInfoProto {
    /// Describes a tensor that is an input or output of a graph.
    #[must_use]
    pub fn tensor(name: &str, data_type: DataType, dims: &[Dim]) -> Self {
        let dim = dims
            .iter()
            .map(|dim| Dimension {
                value: Some(match dim {
                    Dim::Name(name) => DimensionValue::Name((*name).to_owned()),
                    Dim::Size(size) => {
                        DimensionValue::Size(i64::try_from(*size).unwrap_or(i64::MAX))
                    }
                }),
            })
            .collect();
        Self {
            name: name.to_owned(),
            r#type: Some(Type {
                tensor_type: Some(TensorType {
                    elem_type: data_type.into(),
                    shape: Some(TensorShapeProto { dim }),
                }),
            }),
        }
    }
}
