//! Inputs of a graph over whole images, and the numbers that a batch writes into
//! them.

use half::f16;
use ort::memory::Allocator;
use ort::value::{DynTensor, Outlet, PrimitiveTensorElementType, TensorElementType, ValueType};

use super::WholeBatch;
use crate::model::graph::Graph;
use crate::runtime::error::{EngineError, runtime};

/// Input of a graph.
pub(super) struct Input {
    pub(super) name: String,
    pub(super) role: Role,
    element: TensorElementType,
}

/// Number of an input, made of a token, a position or a mask's 1.
pub(super) trait InputNumber: Copy {
    fn of(number: i32) -> Self;
}

impl InputNumber for i64 {
    fn of(number: i32) -> Self {
        number.into()
    }
}

impl InputNumber for i32 {
    fn of(number: i32) -> Self {
        number
    }
}

impl InputNumber for bool {
    fn of(number: i32) -> Self {
        number != 0
    }
}

/// Masks alone have floats, which are 0 and 1.
impl InputNumber for f32 {
    fn of(number: i32) -> Self {
        if number == 0 { 0.0 } else { 1.0 }
    }
}

impl InputNumber for f16 {
    fn of(number: i32) -> Self {
        if number == 0 { Self::ZERO } else { Self::ONE }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    InputIds,
    AttentionMask,
    PositionIds,
    Targets,
}

impl Role {
    /// Returns true if the input's numbers differ from image to image.
    pub(super) fn varies(self) -> bool {
        matches!(self, Self::InputIds | Self::Targets)
    }

    /// Returns true if the input may have numbers of this type.
    fn takes(self, element: TensorElementType) -> bool {
        use TensorElementType::{Bool, Float16, Float32, Int32, Int64};
        match element {
            Int64 | Int32 => true,
            Bool | Float16 | Float32 => self == Self::AttentionMask,
            _ => false,
        }
    }

    /// Writes a batch into an input's memory, and repeats the last row as
    /// padding.
    pub(super) fn fill<T: InputNumber>(self, places: &mut [T], batch: WholeBatch<'_>) {
        let row_len = batch.positions.max(1);
        for (row, places) in batch.rows.iter().zip(places.chunks_exact_mut(row_len)) {
            self.fill_row(places, row.tokens, batch.start);
        }
        let filled = (batch.rows.len() * row_len).min(places.len());
        for padding in (filled..places.len()).step_by(row_len) {
            places.copy_within(filled - row_len..filled, padding);
        }
    }

    /// Writes one row. A start token comes first; then the last token of the
    /// image is not fed, since it is only a target.
    fn fill_row<T: InputNumber>(self, places: &mut [T], tokens: &[u16], start: Option<u16>) {
        match (self, start) {
            (Self::InputIds, Some(start)) => {
                if let Some((first, rest)) = places.split_first_mut() {
                    *first = T::of(start.into());
                    widen(rest, &tokens[..rest.len()]);
                }
            }
            (Self::InputIds, None) | (Self::Targets, _) => widen(places, &tokens[..places.len()]),
            (Self::AttentionMask, _) => places.fill(T::of(1)),
            (Self::PositionIds, _) => {
                for (place, position) in places.iter_mut().zip(0..) {
                    *place = T::of(position);
                }
            }
        }
    }
}

/// Converts tokens, in a loop as fast as memory, since the device waits for it.
fn widen<T: InputNumber>(places: &mut [T], tokens: &[u16]) {
    for (place, &token) in places.iter_mut().zip(tokens) {
        *place = T::of(i32::from(token));
    }
}

/// Recognizes an input of the graph by its name and type.
pub(super) fn input(outlet: &Outlet, graph: Graph) -> Result<Input, String> {
    let name = outlet.name();
    let role = match name {
        "input_ids" => Role::InputIds,
        "attention_mask" => Role::AttentionMask,
        "position_ids" => Role::PositionIds,
        "targets" if graph == Graph::Score => Role::Targets,
        _ => {
            return Err(format!(
                "has an input {name:?}; input_ids, attention_mask and position_ids are supported"
            ));
        }
    };
    match outlet.dtype() {
        ValueType::Tensor { ty, .. } if role.takes(*ty) => Ok(Input {
            name: name.to_owned(),
            role,
            element: *ty,
        }),
        other => Err(format!(
            "input {name:?} is {other:?}; int32 and int64 tensors are supported, and for \
             attention_mask tensors of bool, float16 and float32"
        )),
    }
}

impl Input {
    pub(super) fn tensor(
        &self,
        allocator: &Allocator,
        batch: WholeBatch<'_>,
    ) -> Result<DynTensor, EngineError> {
        DynTensor::new(allocator, self.element, [batch.size, batch.positions]).map_err(runtime)
    }

    /// Writes the numbers of each row; padding repeats the last row, which
    /// costs nothing extra and has valid tokens.
    pub(super) fn fill(
        &self,
        tensor: &mut DynTensor,
        batch: WholeBatch<'_>,
    ) -> Result<(), EngineError> {
        match self.element {
            TensorElementType::Int64 => self.fill_with::<i64>(tensor, batch),
            TensorElementType::Bool => self.fill_with::<bool>(tensor, batch),
            TensorElementType::Float16 => self.fill_with::<f16>(tensor, batch),
            TensorElementType::Float32 => self.fill_with::<f32>(tensor, batch),
            _ => self.fill_with::<i32>(tensor, batch),
        }
    }

    fn fill_with<T: InputNumber + PrimitiveTensorElementType>(
        &self,
        tensor: &mut DynTensor,
        batch: WholeBatch<'_>,
    ) -> Result<(), EngineError> {
        let (_, places) = tensor.try_extract_tensor_mut::<T>().map_err(runtime)?;
        self.role.fill(places, batch);
        Ok(())
    }
}
