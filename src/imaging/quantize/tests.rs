use proptest::prelude::*;

use super::*;

/// Compares all colors, as numpy would.
fn brute_force(palette: &Palette, rgb: [u8; 3]) -> u16 {
    let color = rgb.map(|byte| f64::from(byte) / 127.5 - 1.0);
    let mut best = (f64::INFINITY, 0);
    for (token, &cluster) in (0..).zip(palette.clusters()) {
        let distance = distance(color, cluster);
        if distance < best.0 {
            best = (distance, token);
        }
    }
    best.1
}

fn palette(clusters: Vec<[f64; 3]>) -> Palette {
    Palette::new(clusters).unwrap()
}

fn gray(level: f64) -> [f64; 3] {
    [level; 3]
}

#[test]
fn the_lowest_index_wins_a_tie() {
    let quantizer = Quantizer::new(&palette(vec![gray(1.0), gray(-1.0), gray(1.0), gray(-1.0)]));
    assert_eq!(quantizer.nearest([255; 3]), 0);
    assert_eq!(quantizer.nearest([0; 3]), 1);
    assert_eq!(
        *quantizer.quantize(&[255, 255, 255, 0, 0, 0, 250, 250, 250]),
        [0, 1, 0]
    );
}

#[test]
fn every_gray_and_corner_is_exact() {
    let clusters = (0..=8).map(|step| gray(f64::from(step) / 4.0 - 1.0));
    let palette = palette(clusters.collect());
    let quantizer = Quantizer::new(&palette);
    let corners = [0, 7, 8, 255].map(|red| [red, 255 - red, 31]);
    for rgb in (0..=255).map(|level| [level; 3]).chain(corners) {
        assert_eq!(
            quantizer.nearest(rgb),
            brute_force(&palette, rgb),
            "{rgb:?}"
        );
    }
}

#[test]
fn palettes_are_checked() {
    let check = |clusters: Vec<[f64; 3]>, expected: &str| {
        assert_eq!(Palette::new(clusters).unwrap_err().to_string(), expected);
    };
    check(vec![], "clusters: the list of colors is empty");
    check(
        vec![[0.0; 3]; 65_536],
        "clusters: 65536 colors do not fit 16-bit tokens; the limit is 65535",
    );
    check(
        vec![[0.0; 3], [0.0, f64::NAN, 0.0]],
        "clusters: color 1 is [0.0, NaN, 0.0]; each number must be finite and near -1 to 1",
    );
    check(
        vec![[f64::INFINITY, 0.0, 0.0]],
        "clusters: color 0 is [inf, 0.0, 0.0]; each number must be finite and near -1 to 1",
    );
}

fn any_palette() -> impl Strategy<Value = Palette> {
    let float = prop::array::uniform3(-1.1..1.1_f64);
    // With byte levels ties are frequent, and with few levels colors repeat.
    let byte = prop::array::uniform3(0..=255_u8)
        .prop_map(|rgb| rgb.map(|byte| f64::from(byte) / 127.5 - 1.0));
    let coarse =
        prop::array::uniform3(0..3_u8).prop_map(|rgb| rgb.map(|step| f64::from(step) - 1.0));
    prop_oneof![
        prop::collection::vec(float, 1..600).prop_map(palette),
        prop::collection::vec(byte, 1..600).prop_map(palette),
        prop::collection::vec(coarse, 1..40).prop_map(palette),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_answer_is_brute_forces(
        palette in any_palette(),
        colors in prop::collection::vec(prop::array::uniform3(any::<u8>()), 2000),
    ) {
        let quantizer = Quantizer::new(&palette);
        for rgb in colors {
            prop_assert_eq!(quantizer.nearest(rgb), brute_force(&palette, rgb), "{:?}", rgb);
        }
    }
}
