//! Tests of copies between tensors over the fake driver, whose device's memory
//! is the host's, so that all tensors are the CPU's.

use std::fmt::Debug;

use half::{bf16, f16};
use ort::memory::Allocator;
use ort::value::{DynTensor, PrimitiveTensorElementType, Tensor, TensorElementType};

use super::*;
use crate::gpu::copies::tests::FakeDriver;
use crate::runtime::library::{environment, find_library};

/// Size of a fake driver's buffers, which is less than most copies take.
const BYTES_MAX: usize = 100;

/// Returns copies over a driver.
pub(in crate::engine::onnx) fn over(driver: &FakeDriver) -> EngineCopies {
    let mut copies = EngineCopies::by_runtime();
    copies.take(driver.open(BYTES_MAX));
    assert!(copies.are_the_drivers());
    copies
}

fn tensor(element: TensorElementType, shape: [usize; 2]) -> DynTensor {
    environment(&find_library(None)).expect("make setup has brought it");
    DynTensor::new(&Allocator::default(), element, shape).expect("memory")
}

/// Copies numbers to the device and back, and compares them.
fn there_and_back<T>(copies: &mut EngineCopies, element: TensorElementType, of: impl Fn(u8) -> T)
where
    T: PrimitiveTensorElementType + Copy + PartialEq + Debug,
{
    let tensors = || [3, 40].map(|n| tensor(element, [2, n]));
    let (mut host, mut device, mut back) = (tensors(), tensors(), tensors());
    for tensor in &mut host {
        let (_, numbers) = tensor.try_extract_tensor_mut::<T>().expect("its type");
        for (number, idx) in numbers.iter_mut().zip(0..) {
            *number = of(idx);
        }
    }
    copies.reserve(&[&host[0], &host[1]], &back[1]);
    assert_eq!(copies.refusal(), None);
    copies
        .upload(host.iter_mut().zip(&mut device))
        .expect("an upload");
    for (device, back) in device.iter_mut().zip(&mut back) {
        copies.download(device, back).expect("a download");
    }
    for (host, back) in host.iter().zip(&back) {
        let numbers = |tensor: &DynTensor| -> Vec<T> {
            let (_, numbers) = tensor.try_extract_tensor::<T>().expect("its type");
            numbers.to_vec()
        };
        assert_eq!(numbers(host), numbers(back));
        assert!(numbers(back).iter().any(|number| *number != of(0)));
    }
}

fn all_types(copies: &mut EngineCopies) {
    use TensorElementType::{Bool, Float16, Float32, Int32, Int64};
    there_and_back::<i64>(copies, Int64, |idx| i64::from(idx) - (1 << 40));
    there_and_back::<i32>(copies, Int32, |idx| i32::from(idx) - 7);
    there_and_back::<bool>(copies, Bool, |idx| idx % 3 == 0);
    there_and_back::<f32>(copies, Float32, |idx| f32::from(idx) / 3.0);
    there_and_back::<f16>(copies, Float16, |idx| f16::from_f32(f32::from(idx)));
}

#[test]
fn numbers_of_every_type_arrive() {
    let driver = FakeDriver::new();
    let mut copies = over(&driver);
    all_types(&mut copies);
    // ONNX Runtime's copies do not take this type, which no input or output has.
    let element = TensorElementType::Bfloat16;
    there_and_back::<bf16>(&mut copies, element, |idx| bf16::from_f32(idx.into()));
    drop(copies);
    assert!(driver.count("uploads") > 12, "some went in pieces");
    assert_eq!(driver.count("pinned"), 0, "nothing is left of the copies");
    all_types(&mut EngineCopies::by_runtime());
}

#[test]
fn tensors_that_differ_are_refused() {
    let driver = FakeDriver::new();
    let mut copies = over(&driver);
    let mut host = tensor(TensorElementType::Float32, [2, 3]);
    for other in [
        tensor(TensorElementType::Float32, [2, 2]),
        tensor(TensorElementType::Int32, [2, 3]),
    ] {
        let mut device = other;
        copies.reserve(&[&host], &host);
        copies
            .upload([(&mut host, &mut device)])
            .expect_err("it differs");
        copies
            .download(&mut device, &mut host)
            .expect_err("it differs");
    }
    assert_eq!(driver.count("uploads") + driver.count("downloads"), 0);
}

#[test]
fn memory_that_cannot_be_pinned_leaves_copies_to_the_runtime() {
    let driver = FakeDriver::new();
    let mut copies = over(&driver);
    let _loaded = environment(&find_library(None)).expect("make setup has brought it");
    driver.fail("cuMemHostAlloc", 2);
    let mut host = Tensor::from_array(([3], vec![1, 2, 3])).expect("a tensor");
    let mut device = Tensor::from_array(([3], vec![0, 0, 0])).expect("a tensor");
    copies.reserve(&[&host], &host);
    let refusal = copies.refusal().expect("it was asked for");
    assert!(refusal.contains("out of memory"), "{refusal}");
    assert!(!copies.are_the_drivers());
    assert_eq!(driver.count("held"), 0, "the device is let go of");
    copies
        .upload([(&mut host, &mut device)])
        .expect("a copy of the runtime");
    assert_eq!(device.extract_tensor().1, [1, 2, 3]);
    assert_eq!(driver.count("uploads"), 0);
}

#[test]
fn a_driver_that_is_not_there_leaves_copies_to_the_runtime() {
    let mut copies = EngineCopies::by_runtime();
    assert_eq!(copies.refusal(), None, "nobody asked for more");
    copies.take(Err("there is no NVIDIA driver (libcuda.so.1)".to_owned()));
    assert!(!copies.are_the_drivers());
    let reason = Some("there is no NVIDIA driver (libcuda.so.1)");
    assert_eq!(copies.refusal(), reason);
}

#[test]
fn only_a_gpu_has_a_driver() {
    let environment = environment(&find_library(None)).expect("make setup has brought it");
    let cpu = Runtime::new(environment, Provider::Cpu).expect("a runtime");
    for way in [GpuCopies::OnnxRuntime, GpuCopies::Driver] {
        let copies = EngineCopies::open(way, &cpu);
        assert!(!copies.are_the_drivers());
        assert_eq!(copies.refusal(), None);
    }
}
