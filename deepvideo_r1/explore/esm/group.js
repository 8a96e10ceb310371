// What the rewards of one group say, as in `deepvideo_r1.advantage`.

/** Group advantages (Eq. 5): the rewards, centred and divided by their standard deviation; 0 where all are equal. */
export function groupAdvantages(rewards) {
  const mean = rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length;
  if (Math.max(...rewards) - Math.min(...rewards) <= 1e-6) return rewards.map(() => 0);
  const variance = rewards.reduce((sum, reward) => sum + (reward - mean) ** 2, 0) / rewards.length;
  return rewards.map((reward) => (reward - mean) / (Math.sqrt(variance) + 1e-6));
}
