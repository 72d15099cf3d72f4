//! Tests of filling, in every type that keys and values have.

use std::path::Path;

use half::{bf16, f16};

use super::*;
use crate::runtime::library::{environment, find_library};

const N_SLOTS: usize = 3;
const SLOT: [usize; 3] = [2, BLOCK, 4];

/// Returns a cache of some type, and a session of the same device.
fn cache(element: TensorElementType, is_on_device: bool) -> (KvCache, Session) {
    let environment = environment(&find_library(None)).expect("make setup has brought it");
    let runtime = Runtime::new(environment, Provider::Cpu).expect("a runtime");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/micro/model.onnx");
    let session = runtime.open(&model, None).expect("a session");
    let layout = KvLayout {
        n_layers: 1,
        element,
        slot: SLOT,
    };
    let cache = KvCache::new(&runtime, layout, N_SLOTS, is_on_device);
    let mut cache = cache.expect("a cache");
    cache.allocate(&session).expect("memory");
    (cache, session)
}

/// Fills all slots with one number and the second with another; returns the
/// numbers of each buffer.
fn filled<T>(element: TensorElementType, is_on_device: bool, all: f32, one: f32) -> Vec<Vec<T>>
where
    T: PrimitiveTensorElementType + bytemuck::Pod,
{
    let (mut cache, session) = cache(element, is_on_device);
    let fill = |cache: &mut KvCache, first, n, number| {
        cache.fill(&session, first, n, number).expect("filled");
    };
    fill(&mut cache, 0, N_SLOTS, all);
    fill(&mut cache, 1, 1, one);
    let buffers = cache
        .buffers
        .iter_mut()
        .map(|buffer| match &mut buffer.place {
            Place::Host(memory) => bytemuck::cast_slice(memory).to_vec(),
            Place::Device(tensor) => {
                let (_, numbers) = tensor.try_extract_tensor::<T>().expect("its type");
                numbers.to_vec()
            }
        });
    buffers.collect()
}

fn check<T>(element: TensorElementType, all: (f32, T), one: (f32, T))
where
    T: PrimitiveTensorElementType + bytemuck::Pod + PartialEq + std::fmt::Debug,
{
    let slot = SLOT.iter().product();
    let expected = [vec![all.1; slot], vec![one.1; slot], vec![all.1; slot]].concat();
    for is_on_device in [false, true] {
        let buffers = filled::<T>(element, is_on_device, all.0, one.0);
        assert_eq!(buffers.len(), 2, "keys and values");
        for buffer in buffers {
            assert_eq!(buffer, expected, "{element:?} {is_on_device}");
        }
    }
}

#[test]
fn caches_of_every_type_are_filled() {
    use TensorElementType::{Bfloat16, Float16, Float32, Uint8};
    check(Float32, (1.5, 1.5_f32), (0.0, 0.0));
    check(Float16, (1.5, f16::from_f32(1.5)), (0.0, f16::ZERO));
    check(Bfloat16, (1.5, bf16::from_f32(1.5)), (0.0, bf16::ZERO));
    check(Uint8, (0.0, 0_u8), (0.0, 0));
    // NaN is no number that equals itself.
    for is_on_device in [false, true] {
        let nan = filled::<bf16>(Bfloat16, is_on_device, 0.0, f32::NAN).concat();
        let n_nan = nan.iter().filter(|number| number.is_nan()).count();
        assert_eq!(n_nan, 2 * SLOT.iter().product::<usize>());
    }
}
