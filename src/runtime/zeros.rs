//! Zeros in memory of any device.
#![expect(
    unsafe_code,
    reason = "a tensor's bytes are known by their address alone"
)]

use ort::value::{DynTensor, Shape, Tensor, TensorRefMut};

/// Sets all numbers of a tensor to zero. Memory of a device is not zero when it
/// is allocated.
///
/// # Errors
///
/// When the tensor has texts, or the copy to its device fails.
pub(crate) fn clear(tensor: &mut DynTensor) -> ort::Result<()> {
    let bytes = tensor.size();
    let bytes = bytes.ok_or_else(|| ort::Error::new("texts cannot be zero"))?;
    let zeros = Tensor::from_array(([bytes], vec![0_u8; bytes]))?;
    let memory = tensor.memory_info().to_owned();
    let shape = Shape::new([i64::try_from(bytes).unwrap_or(i64::MAX)]);
    // The bytes are copied as such, since the copies of ONNX Runtime do not take
    // bfloat16.
    //
    // SAFETY: the tensor has that many bytes in that memory, and is borrowed
    // until the copy has ended. Zeros are valid numbers of every type.
    let view = unsafe { TensorRefMut::<u8>::from_raw(memory, tensor.data_ptr_mut(), shape)? };
    zeros.copy_into(view)
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use ort::memory::Allocator;
    use ort::value::{PrimitiveTensorElementType, TensorElementType};

    use super::*;
    use crate::runtime::library::{environment, find_library};

    fn cleared<T>(element: TensorElementType, number: T)
    where
        T: PrimitiveTensorElementType + Copy + PartialEq + std::fmt::Debug + Default,
    {
        let tensor = DynTensor::new(&Allocator::default(), element, [3_usize, 5]);
        let mut tensor = tensor.expect("memory");
        tensor
            .try_extract_tensor_mut::<T>()
            .expect("its type")
            .1
            .fill(number);
        clear(&mut tensor).expect("a copy");
        let (_, numbers) = tensor.try_extract_tensor::<T>().expect("its type");
        assert_eq!(numbers, [T::default(); 15]);
    }

    #[test]
    fn numbers_of_every_type_are_cleared() {
        let _loaded = environment(&find_library(None)).expect("make setup has brought it");
        cleared(TensorElementType::Float32, f32::NAN);
        cleared(TensorElementType::Float16, f16::NAN);
        cleared(TensorElementType::Bfloat16, bf16::NAN);
        cleared(TensorElementType::Uint8, 7_u8);
    }
}
