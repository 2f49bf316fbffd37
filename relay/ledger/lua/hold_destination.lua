-- KEYS: the health of a destination. ARGV: 'hold' or 'release', seconds (0 until released), reason, by whom. The hold is
-- ["since", "until", reason, by], an ended one joins the intervals of "held_past". Returns 1 where it was held before.
local key, word, seconds = KEYS[1], ARGV[1], tonumber(ARGV[2])
local now = clock()

local function read(name)
  local stored = redis.call('HGET', key, name)
  local sound, found = pcall(cjson.decode, stored or '')
  if sound and type(found) == 'table' then return found end
  return nil
end

local held = read('held')
local since, until_ = held and tonumber(held[1]), held and tonumber(held[2])
if not (since and until_ and since > 0 and since < 1e11 and until_ >= 0 and until_ < 1e11) then held = nil end
local on = held and (until_ == 0 or now < until_)
if held and not (on and word == 'hold') then
  local ended = on and now or until_
  local kept = {}
  for _, span in ipairs(read('held_past') or {}) do
    if type(span) == 'table' and tonumber(span[1]) and tonumber(span[2]) then kept[#kept + 1] = span end
  end
  if ended > since then kept[#kept + 1] = {string.format('%.3f', since), string.format('%.3f', ended)} end
  while #kept > 100 do table.remove(kept, 1) end
  redis.call('HSET', key, 'held_past', cjson.encode(kept))
  redis.call('HDEL', key, 'held')
end
if word == 'hold' then
  local from = on and since or now
  local ends = seconds > 0 and now + seconds or 0
  local form = {string.format('%.3f', from), string.format('%.3f', ends), ARGV[3], ARGV[4]}
  redis.call('HSET', key, 'held', cjson.encode(form))
end
return on and 1 or 0
