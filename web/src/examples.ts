// Pictures that come with the page: some that models/emoji was not trained on.

import bread from "../../models/pictures/food-drink/bread.png";
import cherries from "../../models/pictures/food-drink/cherries.png";
import flushed from "../../models/pictures/smileys-emotion/flushed.png";
import rainbow from "../../models/pictures/flags/rainbow-flag.png";
import racingCar from "../../models/pictures/travel-places/racing-car.png";
import rooster from "../../models/pictures/animals-nature/rooster.png";
import shirt from "../../models/pictures/objects/shirt.png";
import snowman from "../../models/pictures/travel-places/snowman-without-snow.png";

export const EXAMPLES: readonly { name: string; bytes: Uint8Array<ArrayBuffer> }[] = [
  { name: "rooster.png", bytes: rooster },
  { name: "bread.png", bytes: bread },
  { name: "cherries.png", bytes: cherries },
  { name: "flushed.png", bytes: flushed },
  { name: "rainbow-flag.png", bytes: rainbow },
  { name: "racing-car.png", bytes: racingCar },
  { name: "shirt.png", bytes: shirt },
  { name: "snowman-without-snow.png", bytes: snowman },
];
