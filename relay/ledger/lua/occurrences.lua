-- Put in front of the scripts that change or remove a copy's state: how many are open in a group of divergence is always
-- what the states say, see ledger/divergence.py. A state's "g" is an object of group -> recipients, the group with its
-- kind's letter in front; of "q", which has those counted before, nothing is open.
local function noted_in(state)
  if not state or not string.find(state, '"g":', 1, true) then return nil end
  local sound, record = pcall(cjson.decode, string.sub(state, (string.find(state, '\n', 1, true) or 0) + 1))
  if sound and type(record) == 'table' and type(record.g) == 'table' then return record end
  return nil
end

local function each_noted(states, visit)
  for _, state in ipairs(states) do
    local record = noted_in(state)
    if record then
      local first = type(record.h) == 'table' and type(record.h[1]) == 'table' and tonumber(record.h[1][1])
      for group, recipients in pairs(record.g) do
        if type(recipients) == 'table' then
          for _, n in ipairs(recipients) do visit(tostring(group), tostring(n), first or tonumber(record.s) or 0) end
        end
      end
    end
  end
end

local function group_key(destination, group)
  local key = string.sub(group, 2)
  if not redis.call('ZSCORE', 'smtpdup:divergence:' .. destination, key) then
    local letter = string.sub(group, 1, 1)
    key = letter == 'd' and 'other-deferred' or letter == 'g' and 'other-given-up' or 'other'
  end
  return 'smtpdup:diverged:' .. destination .. ':' .. key
end

local function turn(destination, before, after, how, noise)
  local open, still, change, ended = {}, {}, {}, {}
  local time = redis.call('TIME')
  each_noted(after, function(group, n)
    open[group .. ' ' .. n] = true
    still[n] = true
    change[group] = (change[group] or 0) + 1
  end)
  local seen = {}
  each_noted(before, function(group, n, first)
    if seen[group .. ' ' .. n] then return end
    seen[group .. ' ' .. n] = true
    change[group] = (change[group] or 0) - 1
    if not open[group .. ' ' .. n] and not still[n] then
      local field = how
      if how == 'resolved' and string.sub(group, 1, 1) == 'd' and time[1] - first <= noise then field = 'noise' end
      ended[group] = ended[group] or {}
      ended[group][field] = (ended[group][field] or 0) + 1
    end
  end)
  for group, by in pairs(change) do
    local key = group_key(destination, group)
    if (by ~= 0 or ended[group]) and redis.call('EXISTS', key) == 1 then
      if redis.call('HINCRBY', key, 'open', by) < 0 then redis.call('HSET', key, 'open', 0) end
      redis.call('HINCRBY', key, 'turns', 1)
      for field, count in pairs(ended[group] or {}) do redis.call('HINCRBY', key, field, count) end
    end
  end
end

-- What somebody has done to these keys must not keep a copy from its end.
local function turned(...)
  pcall(turn, ...)
end
