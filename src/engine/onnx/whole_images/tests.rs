//! Tests, on a CPU, of the code that GPUs share: buffers that are bound once,
//! also those of captured runs.

use super::super::copies::tests::over;
use super::inputs::InputNumber;
use super::*;
use crate::gpu::copies::tests::FakeDriver;
use crate::model::GraphFiles;
use crate::model::graph::Want;
use crate::model::precision::Provider;
use crate::runtime::Residence;
use crate::runtime::library::{environment, find_library};

const POSITIONS: usize = 64;

fn graph(captures: bool) -> WholeGraph {
    let environment = environment(&find_library(None)).expect("make setup has brought it");
    let runtime = Runtime {
        operators: None,
        n_threads: 1,
        residence: Residence::Packed,
        cuda_graphs: captures,
        ..Runtime::new(environment, Provider::Cpu).expect("a runtime")
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/micro/model.onnx");
    let files = GraphFiles::of(std::slice::from_ref(&path));
    let mut loader = Loader::new(files, std::iter::empty()).expect("files");
    WholeGraph::open(&runtime, &mut loader, Graph::Hidden, &path, false).expect("a graph")
}

fn image(seed: u16) -> Vec<u16> {
    let tokens = 0..u16::try_from(POSITIONS).expect("few");
    tokens.map(|idx| (idx * 7 + seed * 13) % 16).collect()
}

/// Returns the answers of `images` at a batch size.
fn run(graph: &mut WholeGraph, images: &[Vec<u16>], size: usize) -> Vec<Vec<f32>> {
    run_with(&mut EngineCopies::by_runtime(), graph, images, size)
}

fn run_with(
    copies: &mut EngineCopies,
    graph: &mut WholeGraph,
    images: &[Vec<u16>],
    size: usize,
) -> Vec<Vec<f32>> {
    let rows: Vec<BatchRow<'_>> = images
        .iter()
        .map(|tokens| BatchRow {
            tokens,
            want: Want::Mean,
        })
        .collect();
    let run = GraphRun {
        graph: Graph::Hidden,
        bucket: size,
        rows: &rows,
    };
    let batch = WholeBatch {
        rows: &rows,
        size,
        positions: POSITIONS,
        start: None,
    };
    let options = graph.options(size).expect("options");
    let ran = graph.run(&run, batch, &options, copies, &mut None);
    ran.expect("a run")
}

fn near(a: &[Vec<f32>], b: &[Vec<f32>]) -> bool {
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    a.len() == b.len() && pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-6)
}

#[test]
fn buffers_are_made_once_and_hold_each_batch_in_turn() {
    let images: Vec<Vec<u16>> = (0..4).map(image).collect();
    // The first run of a session has no bound buffers.
    let expected: Vec<Vec<f32>> = images
        .iter()
        .map(|image| {
            let mut graph = graph(false);
            run(&mut graph, std::slice::from_ref(image), 1).remove(0)
        })
        .collect();
    assert!(!near(&expected[..1], &expected[1..2]), "images must differ");
    for captures in [false, true] {
        let mut graph = graph(captures);
        for round in 0..3 {
            assert!(near(&run(&mut graph, &images[..1], 1), &expected[..1]));
            assert!(near(&run(&mut graph, &images[1..3], 2), &expected[1..3]));
            // Less than the size is padded.
            assert!(near(&run(&mut graph, &images[1..4], 4), &expected[1..4]));
            assert!(near(&run(&mut graph, &images[3..], 2), &expected[3..]));
            assert_eq!(
                graph.bound.len(),
                if round == 0 { 2 } else { 3 },
                "{captures}"
            );
            if round == 0 {
                // The first run was before the output's shape was known.
                assert!(!graph.bound.contains_key(&1));
            }
        }
    }
}

#[test]
fn copies_over_the_driver_change_no_bit() {
    let images: Vec<Vec<u16>> = (0..4).map(image).collect();
    for captures in [false, true] {
        let driver = FakeDriver::new();
        let mut copies = over(&driver);
        let (mut one, mut other) = (graph(captures), graph(captures));
        for (first, n, size) in [(0, 1, 1), (1, 2, 2), (0, 3, 4), (3, 1, 2), (2, 1, 1)] {
            let images = &images[first..first + n];
            let expected = run(&mut one, images, size);
            let got = run_with(&mut copies, &mut other, images, size);
            assert!(got == expected, "{captures} {first} {size}");
        }
        // The first run has no buffers yet.
        assert!(driver.count("uploads") >= 4, "{captures}");
        assert!(driver.count("downloads") >= 4, "{captures}");
    }
}

#[test]
fn captured_runs_have_a_name_for_each_size() {
    let mut graph = graph(true);
    let id = |graph: &mut WholeGraph, size| {
        let options = graph.options(size).expect("options");
        graph.options.clear();
        let mut options = Arc::into_inner(options).expect("nobody else's");
        options.get(GRAPH_ID)
    };
    assert_eq!(
        id(&mut graph, 4).as_deref(),
        Some(NO_GRAPH),
        "its shape is unknown"
    );
    run(&mut graph, &[image(0)], 1);
    assert_eq!(id(&mut graph, 4).as_deref(), Some("4"));
    assert_eq!(id(&mut graph, 1).as_deref(), Some("1"));
}

#[test]
fn a_run_that_was_stopped_does_not_stop_the_next() {
    let mut graph = graph(false);
    let images = [image(0)];
    let expected = run(&mut graph, &images, 1);
    run(&mut graph, &images, 1);
    let options = graph.options(1).expect("options");
    options.terminate().expect("told to stop");
    let rows = [BatchRow {
        tokens: &images[0],
        want: Want::Mean,
    }];
    let stopped = GraphRun {
        graph: Graph::Hidden,
        bucket: 1,
        rows: &rows,
    };
    let batch = WholeBatch {
        rows: &rows,
        size: 1,
        positions: POSITIONS,
        start: None,
    };
    let copies = &mut EngineCopies::by_runtime();
    let outcome = graph.run(&stopped, batch, &options, copies, &mut None);
    outcome.expect_err("it was told to stop");
    assert!(near(&run(&mut graph, &images, 1), &expected));
    assert!(Arc::ptr_eq(&options, &graph.options(1).expect("options")));
}

/// Returns an input's memory after a batch of two images, and then of one.
fn filled<T: InputNumber>(role: Role, start: Option<u16>) -> [Vec<T>; 2] {
    let images: [&[u16]; 2] = [&[1, 2, 3], &[4, 5, 65535]];
    let rows = images.map(|tokens| BatchRow {
        tokens,
        want: Want::Mean,
    });
    let mut places = vec![T::of(-1); 9];
    let mut fill = |rows: &[BatchRow<'_>]| {
        let batch = WholeBatch {
            rows,
            size: 3,
            positions: 3,
            start,
        };
        role.fill(&mut places, batch);
        places.clone()
    };
    [fill(&rows), fill(&rows[..1])]
}

#[test]
fn inputs_hold_each_row_and_repeat_the_last() {
    assert_eq!(
        filled::<i64>(Role::InputIds, None),
        [
            [1, 2, 3, 4, 5, 65535, 4, 5, 65535],
            [1, 2, 3, 1, 2, 3, 1, 2, 3]
        ]
    );
    assert_eq!(
        filled::<i32>(Role::InputIds, Some(9)),
        [[9, 1, 2, 9, 4, 5, 9, 4, 5], [9, 1, 2, 9, 1, 2, 9, 1, 2]]
    );
    assert_eq!(
        filled::<i32>(Role::Targets, Some(9)),
        filled::<i32>(Role::InputIds, None)
    );
    assert_eq!(filled::<i64>(Role::AttentionMask, None), [[1; 9], [1; 9]]);
    let positions = [0, 1, 2, 0, 1, 2, 0, 1, 2];
    assert_eq!(
        filled::<i64>(Role::PositionIds, None),
        [positions, positions]
    );
}

#[test]
fn all_nodes_are_where_they_should_be() {
    let graph = graph(false);
    let placement = placement::placement(&graph.session).expect("it was recorded");
    let of_cpu = &placement[Provider::Cpu.runtime_name()];
    assert_eq!(placement.len(), 1);
    assert!(of_cpu.values().sum::<usize>() > 10, "{of_cpu:?}");
    placement::check(&placement, Provider::Cpu, false).expect("all on the CPU");
    // The same graph is refused on a GPU that takes none of its nodes.
    placement::check(&placement, Provider::Cuda, false).expect_err("nothing is on the GPU");
}

#[test]
fn masks_of_every_type_are_ones() {
    for mask in filled::<bool>(Role::AttentionMask, None) {
        assert_eq!(mask, [true; 9]);
    }
    for mask in filled::<f16>(Role::AttentionMask, None) {
        assert_eq!(mask, [f16::ONE; 9]);
    }
    for mask in filled::<f32>(Role::AttentionMask, None) {
        let bits: Vec<u32> = mask.into_iter().map(f32::to_bits).collect();
        assert_eq!(bits, [1.0_f32.to_bits(); 9]);
    }
}
